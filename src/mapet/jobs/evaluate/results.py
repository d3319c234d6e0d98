"""The results of an evaluation as tables and files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mapet.data.batches import printable
from mapet.report.tables import Table, percent

MOST_CLASSES_SHOWN = 20
SHARES = ("accuracy", "least", "greatest", "top5")
TABLES = ("sweep", "runs")


def summary_table(results: Mapping[str, Any]) -> Table:
    """Return the single numbers and names of the results."""
    rows = []
    for name, value in results.items():
        if name in SHARES:
            rows.append((name, percent(value, 2)))
        elif name not in ("per_class", "confusion", *TABLES):
            rows.append((name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)))
    return Table(("result", "value"), rows)


def class_table(results: Mapping[str, Any], most: int | None = None) -> Table:
    """Return the accuracy of each class, and the class that its images are most often mistaken for.

    Args:
        results: what ``evaluate`` returns.
        most: shows only the classes with the lowest accuracy, at most this many, and no class without images.
    """
    names, accuracies = [printable(name) for name in results["per_class"]], list(results["per_class"].values())
    shown, title = list(range(len(names))), ""
    if most is not None:
        shown = [number for number in shown if accuracies[number] is not None]
        if len(shown) > most:
            title = f"the {most} worst of {len(shown)} classes"
            shown = sorted(shown, key=lambda number: float(accuracies[number]))[:most]
    rows = []
    for number in shown:
        mistakes = [0 if other == number else count for other, count in enumerate(results["confusion"][number])]
        worst, total = max(mistakes), sum(results["confusion"][number])
        mistaken = f"{worst} of {total} for {names[mistakes.index(worst)]}" if worst else ""
        rows.append((names[number], percent(accuracies[number], 2), mistaken))
    return Table(("class", "accuracy", "most often mistaken"), rows, title)


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``results.md`` and ``confusion.csv`` (rows: true classes) into a folder."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    tables = [summary_table(results)]
    for rows in (results[key] for key in TABLES if key in results):
        tables.append(Table(tuple(rows[0]), [[f"{value:.4g}" for value in row.values()] for row in rows]))
    tables.append(class_table(results))
    (folder / "results.md").write_text("\n".join(table.to_markdown() for table in tables))
    names = [printable(name) for name in results["per_class"]]
    confusion = [(name, *map(str, row)) for name, row in zip(names, results["confusion"], strict=True)]
    (folder / "confusion.csv").write_text(Table(("true class", *names), confusion).to_csv())
