"""The results of an evaluation: as a table, and as files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mapet.data.batches import printable

MOST_CLASSES_SHOWN = 20
SHARES = ("accuracy", "least", "greatest", "top5")
LISTS = ("per_class", "confusion", "sweep", "runs")  # what is not one number or name


def percent(value: float | None) -> str:
    """Write an accuracy in 0..1 as a percentage; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.2f} %"


def result_lines(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a table says of results: name and value."""
    for name, value in results.items():
        if name in SHARES:
            yield name, percent(value)
        elif name not in LISTS:
            yield name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)


def results_table(results: Mapping[str, Any]) -> Table:
    """Return results as a table for the terminal: beside each class what it is taken for; of many classes the worst."""
    table = Table(title=Text(f"{results['kind']}: {results['model']} on {results['data']}"), show_header=False)
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    for name, value in result_lines(results):
        if name not in ("kind", "model", "data"):
            table.add_row(name, value, style="bold" if name == "accuracy" else "")
    table.add_section()
    names, confusion = _names(results), results["confusion"]
    known = [(value, number) for number, value in enumerate(results["per_class"].values()) if value is not None]
    if len(known) > MOST_CLASSES_SHOWN:
        table.add_row(f"the {MOST_CLASSES_SHOWN} worst of {len(known)} classes", "")
        known = sorted(known)[:MOST_CLASSES_SHOWN]
    for value, number in known:
        others = ((count, -other) for other, count in enumerate(confusion[number]) if other != number)
        count, other = max(others, default=(0, 0))  # a classifier may have a single class
        taken = f"{count} of {sum(confusion[number])} taken for {names[-other]}" if count else ""
        table.add_row(Text(names[number]), percent(value), Text(taken))
    return table


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``results.md`` and ``confusion.csv`` (rows: true classes) into a folder."""
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    names = _names(results)
    with (folder / "confusion.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true class", *names])
        writer.writerows([name, *row] for name, row in zip(names, results["confusion"], strict=True))
    lines = ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in result_lines(results))]
    for key in ("sweep", "runs"):
        if rows := results.get(key):
            lines += ["", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
            lines += [f"| {' | '.join(f'{value:.4g}' for value in row.values())} |" for row in rows]
    lines += ["", "| class | accuracy |", "|---|---|"]
    lines += [
        f"| {_cell(name)} | {percent(value)} |"
        for name, value in zip(names, results["per_class"].values(), strict=True)
    ]
    (folder / "results.md").write_text("\n".join(lines) + "\n")


def _names(results: Mapping[str, Any]) -> list[str]:
    """Names of the classes, as they can be written anywhere: they are names of folders, which may hold anything."""
    return [printable(name) for name in results["per_class"]]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
