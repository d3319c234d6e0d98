import csv
import json
from pathlib import Path
from typing import Any

from mapet.jobs.evaluate.results import class_table, write_results

RESULTS: dict[str, Any] = {
    "kind": "linear",
    "model": "m",
    "data": "d",
    "accuracy": 0.5,
    "top5": None,
    "temperature": 0.07,
    "per_class": {"a|b": 0.75, "c\udcff": 0.0, "[red]": None},
    "confusion": [[3, 1, 0], [2, 0, 0], [0, 0, 0]],
    "runs": [{"seed": 0, "accuracy": 0.5}],
}


def test_class_table_names_the_class_that_each_is_mistaken_for() -> None:
    assert class_table(RESULTS).rows == [
        ("a|b", "75.00 %", "1 of 4 for c\\udcff"),
        ("c\\udcff", "0.00 %", "2 of 2 for a|b"),
        ("[red]", "-", ""),
    ]
    assert len(class_table(RESULTS, 2).rows) == 2, "a class without images is not among the worst"
    single = {"per_class": {"a": 1.0}, "confusion": [[3]]}
    assert class_table(single).rows == [("a", "100.00 %", "")]


def test_only_the_worst_of_many_classes_are_shown() -> None:
    accuracies = {f"class {i:02}": (7 * i % 50) / 50 for i in range(50)}
    table = class_table({"per_class": accuracies, "confusion": [[1] * 50] * 50}, 20)
    assert table.title == "the 20 worst of 50 classes"
    assert [row[0] for row in table.rows] == sorted(accuracies, key=lambda name: accuracies[name])[:20]


def test_files_hold_everything(tmp_path: Path) -> None:
    write_results(RESULTS, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    assert list(csv.reader((tmp_path / "confusion.csv").open())) == [
        ["true class", "a|b", "c\\udcff", "[red]"],
        ["a|b", "3", "1", "0"],
        ["c\\udcff", "2", "0", "0"],
        ["[red]", "0", "0", "0"],
    ]
    lines = set((tmp_path / "results.md").read_text().splitlines())
    assert {"| accuracy | 50.00 % |", "| temperature | 0.07 |", "| [red] | - |  |", "| seed | accuracy |"} <= lines
