from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from mapet.jobs.evaluate.results import results_table, write_results

RESULTS: dict[str, Any] = {
    "kind": "linear",
    "model": "[bold]m",
    "data": "d",
    "accuracy": 0.5,
    "top5": None,
    "temperature": 0.07,
    "per_class": {"a|b": 0.75, "c\udcff": 0.0, "[red]": None},
    "confusion": [[3, 1, 0], [2, 0, 0], [0, 0, 0]],
    "runs": [{"seed": 0, "accuracy": 0.5}],
}


def shown(results: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(results_table(results))
    return console.export_text()


def test_the_table_says_what_classes_are_taken_for() -> None:
    text = shown(RESULTS)
    assert "[bold]m" in text
    assert "50.00 %" in text
    assert "1 of 4 taken for c\\udcff" in text
    assert "2 of 2 taken for a|b" in text
    assert "[red]" not in text, "a class without test images has no accuracy to show"


def test_of_many_classes_the_worst_are_shown() -> None:
    names = [f"class {i:03}" for i in range(50)]
    confusion = [[0] * 50 for _ in names]
    for i in range(50):
        confusion[i][i], confusion[i][(i + 1) % 50] = i, 50 - i
    text = shown({**RESULTS, "per_class": {name: i / 50 for i, name in enumerate(names)}, "confusion": confusion})
    assert "the 20 worst of 50 classes" in text
    assert "class 019" in text
    assert "class 030" not in text
    assert "50 of 50 taken for class 001" in text


def test_files_hold_everything(tmp_path: Path) -> None:
    write_results(RESULTS, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    rows = list(csv.reader((tmp_path / "confusion.csv").open()))
    assert rows == [
        ["true class", "a|b", "c\\udcff", "[red]"],
        ["a|b", "3", "1", "0"],
        ["c\\udcff", "2", "0", "0"],
        ["[red]", "0", "0", "0"],
    ]
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert {"| accuracy | 50.00 % |", "| a\\|b | 75.00 % |", "| [red] | - |", "| seed | accuracy |"} <= set(lines)


def test_a_single_class() -> None:
    results = {"kind": "classify", "model": "m", "data": "d", "accuracy": 1.0, "per_class": {"a": 1.0}}
    assert results_table({**results, "confusion": [[3]]}).row_count == 2
