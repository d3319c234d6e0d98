from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from mapet.jobs.compare.report import Comparison, Rates, Row, comparison_markdown, comparison_tables, write_comparison

COST = {"steps": 100, "flops": 2.5e12, "seconds": 60.0, "memory": 2**30}
FREE = {"steps": 0, "flops": 0.0, "seconds": 0.0, "memory": 0}


def row(name: str, seed: int, budgets: tuple[str, ...], accuracy: float) -> Row:
    arm, _, tokenizer = name.partition(", ")
    curve = [(step / 10, 3 - step / 100) for step in range(100)] if arm != "random" else []
    lr, cost = (1e-3, COST) if curve else (None, FREE)
    return Row(name, arm, tokenizer, seed, lr, budgets, cost, {"knn": accuracy}, curve)


def comparison(seeds: int = 2) -> Comparison:
    rows = [row("mapet, a|b", seed, ("steps", "flops"), 0.5 + 0.1 * seed) for seed in range(seeds)]
    rows += [row("random", seed, ("steps", "flops"), 0.25) for seed in range(seeds)]
    rows += [row("mim, a|b", 0, ("flops",), 0.75)]
    names = ("mapet, a|b", "mim, a|b", "random")
    return Comparison(
        "<digits>", ("knn", "linear"), seeds, ("steps", "flops"), names, tuple(rows), {"mim": "a <reason>"}
    )


def test_tables_hold_mean_and_spread_and_say_what_is_missing() -> None:
    steps, flops = (
        dict((cells[0], cells[1:]) for cells in comparison().cells(budget)) for budget in ("steps", "flops")
    )
    assert steps["mapet, a|b"] == ["55.0 +- 7.1", "-", "100", "2.5", "60", "1.00"]
    assert steps["random"] == ["25.0 +- 0.0", "-", "-", "-", "-", "-"]
    assert steps["mim, a|b"] == ["-"] * 6
    assert flops["mim, a|b"][0] == "75.0 (1 of 2)"
    assert [table.row_count for table in comparison_tables(comparison())] == [3, 3]


def test_a_narrow_terminal_shows_every_letter() -> None:
    found = replace(comparison(), measures=("knn", "linear", "attentive", "finetune"))
    console = Console(width=80)
    with console.capture() as shown:
        console.print(*comparison_tables(found))
    assert "k-NN" in shown.get()
    assert "…" not in shown.get()


def test_few_seeds_and_failures_are_remarked() -> None:
    assert "One seed: there is no spread" in comparison(1).remarks[0]
    two, three = ("\n".join(comparison(seeds).remarks) for seeds in (2, 3))
    assert "Two seeds say little" in two
    assert "Two seeds" not in three
    assert "Failed: mim: a <reason>" in three


def test_learning_rates_tried_have_a_table_and_the_one_taken_a_column() -> None:
    rates = {"mapet, a|b": Rates({4e-3: 0.5, 1e-3: 0.75, 2e-3: 0.75}), "mim, a|b": Rates({2e-3: 0.5, 1e-3: 0.25})}
    found = replace(comparison(), lrs=(4e-3, 1e-3, 2e-3), rates=rates, judge="linear")
    *budgets, tried = found.tables()
    assert [table.title for table in budgets] == ["Equal steps, on <digits>", "Equal flops, on <digits>"]
    assert [line[3] for line in budgets[0].lines] == ["0.001", "0.002", "-"]
    assert tried.title == "Learning rates: linear probe of training images held out (%), equal steps"
    assert [list(tried.header), *map(list, tried.lines)] == [
        ["", "0.001", "0.002", "0.004"],
        ["mapet, a|b", "75.0 *", "75.0", "50.0"],
        ["mim, a|b", "25.0", "50.0 *", "failed"],
    ]
    remarks = "\n".join(found.remarks)
    assert "best rate of mapet, a|b is the least tried" in remarks
    assert "best rate of mim" not in remarks, "one beyond it was tried, and failed"
    level = replace(found, rates={"mim, a|b": Rates({1e-3: 0.0, 2e-3: 0.0, 4e-3: 0.0})})
    assert "best rate" not in "\n".join(level.remarks)
    assert "75.0 *" in comparison_markdown(found)


def test_files_hold_what_was_found(tmp_path: Path) -> None:
    write_comparison(comparison(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.md", "comparison.png", "report.html"}
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    columns = ("budget", "arm", "tokenizer", "seed", "lr", "knn")
    assert [tuple(line[column] for column in columns) for line in lines][:3] == [
        ("steps", "mapet", "a|b", "0", "0.001", "0.5"),
        ("steps", "mapet", "a|b", "1", "0.001", "0.6"),
        ("steps", "random", "", "0", "", "0.25"),
    ]
    assert "| mapet, a\\|b | 55.0 +- 7.1 |" in (tmp_path / "results.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "&lt;digits&gt;" in page
    assert "<digits>" not in page
    assert "a &lt;reason&gt;" in page
