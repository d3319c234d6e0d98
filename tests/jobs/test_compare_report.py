import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TINY

from mapet import MapetError
from mapet.cli import main
from mapet.jobs.compare.arms import Arm
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.compare.plan import Plan
from mapet.jobs.compare.report import Comparison, write_comparison
from mapet.jobs.compare.table import tabulate_runs
from mapet.jobs.pretrain.run import pretrain


def run(label: str, seed: int, budgets: tuple[str, ...], knn: float) -> dict[str, Any]:
    arm, _, tokenizer = label.partition(", ")
    figures = {"label": label, "arm": arm, "tokenizer": tokenizer, "seed": seed, "budgets": budgets, "knn": knn}
    if arm == "random":
        return figures
    return {**figures, "lr": 1e-3, "steps": 100, "flops": 2.5e12, "seconds": 60.0}


def comparison(seeds: int = 2, **keys: Any) -> Comparison:
    runs = [run("mapet, a|b", seed, ("steps", "flops"), 0.5 + 0.1 * seed) for seed in range(seeds)]
    runs += [run("random", seed, ("steps", "flops"), 0.25) for seed in range(seeds)]
    runs += [run("mim, a|b", 0, ("flops",), 0.75)]
    config: Any = CompareConfig(data="<digits>", budget=("steps", "flops"), seeds=seeds, **keys)
    names = (("mapet", "a|b"), ("mim", "a|b"), ("random", ""))
    nothing: Any = None
    arms = [Arm(name, tokenizer, {}, nothing, 1.0, None) for name, tokenizer in names]
    return Comparison(Plan(config, arms, {}, [], "", Path()), {}, runs, {"mim": "a <reason>"})


def test_tables_hold_mean_and_spread_and_remarks_name_few_seeds_and_failures() -> None:
    steps, flops = ({row[0]: list(row[1:]) for row in table.rows} for table in comparison().tables())
    assert steps["mapet, a|b"] == ["55.0 +- 7.1", "-", "100", "2.5", "60"]
    assert steps["random"] == ["25.0 +- 0.0", "-", "-", "-", "-"]
    assert steps["mim, a|b"] == ["-"] * 5
    assert flops["mim, a|b"][0] == "75.0 (1 of 2)"
    two, three = ("\n".join(comparison(seeds).remarks()) for seeds in (2, 3))
    assert "take --seeds 3 or more" in two
    assert "take --seeds 3 or more" not in three
    assert "Failed: mim: a <reason>" in three


def test_tried_learning_rates_have_a_table_and_the_chosen_one_a_column() -> None:
    rates = {"mapet, a|b": {4e-3: 0.5, 1e-3: 0.75, 2e-3: 0.75}, "mim, a|b": {2e-3: 0.5, 1e-3: 0.25}}
    found = replace(comparison(measures=("linear",), lrs=(4e-3, 1e-3, 2e-3)), rates=rates)
    *budgets, tried = found.tables()
    assert [row[2] for row in budgets[0].rows] == ["0.001", "-", "-"]
    assert tried.title == "Learning rates: linear probe (%) of held-out training images, equal steps"
    assert [list(tried.header), *map(list, tried.rows)] == [
        ["", "0.001", "0.002", "0.004"],
        ["mapet, a|b", "75.0 *", "75.0", "50.0"],
        ["mim, a|b", "25.0", "50.0 *", "failed"],
    ]
    remarks = "\n".join(found.remarks())
    assert "best rate of mapet, a|b is the least tried" in remarks
    assert "best rate of mim" not in remarks, "a greater one was tried, and failed"


def test_files_hold_the_tables(tmp_path: Path) -> None:
    write_comparison(comparison(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results.md", "comparison.png", "report.html"}
    assert (tmp_path / "results.csv").read_text().splitlines()[:4] == [
        "budget,arm,tokenizer,seed,lr,knn,linear,steps,flops,seconds",
        "steps,mapet,a|b,0,0.001,0.5,,100,2500000000000.0,60.0",
        "steps,mapet,a|b,1,0.001,0.6,,100,2500000000000.0,60.0",
        "steps,random,,0,,0.25,,,,",
    ]
    assert "| mapet, a\\|b | 55.0 +- 7.1 |" in (tmp_path / "results.md").read_text()
    page = (tmp_path / "report.html").read_text()
    for part in ("on &lt;digits&gt;", "<td>mapet, a|b</td>", "a &lt;reason&gt;", "data:image/png;base64,iVBOR"):
        assert part in page


def test_run_folders_are_tabulated(
    digits: Path, pretrained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, keys = tmp_path / "b", {key: value for key, value in TINY.items() if key != "vocab_size"}
    pretrain({**keys, "data": str(digits), "steps": 3, "objective": "simmim", "lr": 2e-3}, other)
    (other / "knn").mkdir()
    (other / "knn" / "results.json").write_text('{"kind": "knn", "accuracy": 0.5}')
    assert main(["table", str(pretrained_run), str(other), "--csv", "--out", str(tmp_path / "tables")]) == 0
    said = capsys.readouterr().out
    assert said == (tmp_path / "tables" / "runs.csv").read_text()
    first, second = csv.DictReader(said.splitlines())
    shown = ("objective", "tokenizer", "steps", "images", "learning rate", "k-NN (%)")
    assert [first[name] for name in shown] == ["mapet", "pixels", "2", "16", "0.001", "-"]
    assert [second[name] for name in shown] == ["simmim", "-", "3", "24", "0.002", "50.0"]
    assert first["baseline"] != "-"
    assert "model" not in first, "it is the same"
    with pytest.raises(MapetError, match="none' holds no run"):
        tabulate_runs([str(tmp_path / "none")])
