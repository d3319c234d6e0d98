import csv
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import TINY, assert_same_run, mapet_command

from mapet import MapetError
from mapet.engine.files import held_folder
from mapet.jobs.compare.report import Comparison
from mapet.jobs.compare.run import compare, join_comparison
from mapet.jobs.compare.table import tabulate_runs

VALUES = {**TINY, "objectives": ["mim", "random"], "seeds": 1, "steps": 4, "budget": ["steps"], "measures": ["knn"]}


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def figures(comparison: Comparison, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(run.get(name) for name in names) for run in comparison.runs]


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.05)


def start(out: Path, **values: Any) -> subprocess.Popen[str]:
    command = mapet_command("compare", values, out)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_cell_that_fails_is_named_and_an_extension_does_only_what_is_new(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    bold = {"bold": {"objective": "mim", "lr": 1e3, "weight_decay": 1e3, "clip_grad": 1e30, "warmup": 0.0}}
    found = compare({**VALUES, "arms": bold, "data": str(digits)}, out)
    assert figures(found, "label", "seed") == [("mim, pixels", 0), ("random", 0)]
    trained = found.runs[0]
    assert (trained["steps"], trained["lr"]) == (4, 1e-3)
    assert min(trained["flops"], trained["seconds"]) > 0
    assert 0 <= trained["knn"] <= 1
    assert list(found.failures) == ["bold, pixels, seed 0, equal steps"]
    assert "start another run with a lower --lr" in found.failures["bold, pixels, seed 0, equal steps"]

    assert [(row["arm"], row["steps"]) for row in read_csv(out)] == [("mim", "4"), ("random", "")]
    table = (out / "results.md").read_text()
    assert f"| mim, pixels | {100 * trained['knn']:.1f} | 4 |" in table
    assert "| bold, pixels | - |" in table
    assert "- Failed: bold, pixels, seed 0, equal steps: " in table

    with pytest.raises(MapetError, match="holds a comparison; pass --resume"):
        compare({**VALUES, "data": str(digits)}, out)
    moved = out.rename(tmp_path / "moved")
    times = {path: path.stat().st_mtime_ns for path in moved.rglob("metrics.jsonl")}
    linear = {"steps": 5, "lr": (0.3,), "weight_decay": (1e-3,)}  # tuples in Python, lists in files
    extended = compare({"arms": {}, "measures": ["knn", "linear"], "linear": linear, "workers": 1}, moved, resume=True)
    assert not extended.failures
    assert figures(extended, "label", "knn") == figures(found, "label", "knn")
    assert all(0 <= run["linear"] <= 1 for run in extended.runs)
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("metrics.jsonl")} == times

    (run,) = moved.glob("cells/mim-*/run")
    (row,) = tabulate_runs([str(run)]).rows
    assert f"{100 * trained['knn']:.1f}" in row
    (results,) = run.glob("knn-*/results.json")
    results.write_text("[1]")
    with pytest.raises(MapetError, match=r"results.json is damaged .* remove its folder or restore it"):
        compare({}, moved, resume=True)


def test_the_learning_rate_that_does_best_on_held_out_images_is_taken(digits: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in VALUES.items() if key != "lr"}
    asked = {**values, "objectives": ["simmim"], "lrs": [1e-5, 1e3], "weight_decay": 1e3, "data": str(digits)}
    found = compare(asked, tmp_path)
    assert list(found.failures) == ["simmim, trial of learning rate 1000"]
    assert list(found.rates["simmim"]) == [1e-5]
    assert figures(found, "label", "seed", "lr") == [("simmim", 0, 1e-5)]
    assert len(list(tmp_path.glob("cells/simmim-seed1000-*"))) == 2
    *_, rates = found.tables()
    assert rates.header == ["", "1e-05", "1000"]
    assert [row[2] for row in rates.rows] == ["failed"]
    assert "| learning rate |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda sign: sign.name)
def test_a_comparison_that_was_stopped_goes_on_and_ends_with_the_same_table(
    sign: signal.Signals, digits: Path, tmp_path: Path
) -> None:
    values = {**VALUES, "steps": 100, "checkpoint_every": 10, "data": str(digits)}
    process = start(tmp_path / "stopped", **values)
    wait_for(tmp_path / "stopped", "cells/mim*/run/checkpoints/last")
    process.send_signal(sign)
    said = process.communicate(timeout=120)[1]
    if sign != signal.SIGKILL:
        assert process.returncode == 128 + sign
        assert "what is done is saved: --resume continues" in said
        assert not list(tmp_path.glob("stopped/cells/mim*/failure.txt"))
    found = compare({}, tmp_path / "stopped", resume=True)
    whole = compare(values, tmp_path / "whole")
    assert found.failures == {}
    assert figures(found, "label", "knn") == figures(whole, "label", "knn")
    one, other = (next(tmp_path.glob(f"{name}/cells/mim*/run")) for name in ("stopped", "whole"))
    assert_same_run(one, other)


def test_processes_that_join_share_the_cells(digits: Path, tmp_path: Path) -> None:
    out, moved = tmp_path / "comparison", shutil.copytree(digits, tmp_path / "as another machine sees them")
    first = start(out, **{**VALUES, "objectives": ["mapet", "mim"], "data": str(digits)})
    wait_for(out, "cells/*/.lock")
    found = join_comparison({"data": str(moved), "workers": 0}, out)
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 0
    assert "Traceback" not in said
    assert figures(found, "label") == [("mapet, pixels",), ("mim, pixels",)]
    assert [line["knn"] for line in read_csv(out)] == [str(run["knn"]) for run in found.runs]
    configs = [yaml.safe_load(path.read_text()) for path in sorted(out.glob("cells/*/run/config.yaml"))]
    assert [config["data"] for config in configs] == [str(digits), str(moved)], "each process trains one of the two"
    assert len(list(out.glob("tokenizers/pixels-*/tokenizer.json"))) == 1

    with pytest.raises(MapetError, match="joined as it is, but 'seeds' would make it another"):
        join_comparison({"seeds": 2}, out)
    with pytest.raises(MapetError, match=r"mine' holds no comparison to join; begin it first"):
        join_comparison({}, tmp_path / "mine")


def test_a_folder_that_cannot_be_used_is_refused(digits: Path, tmp_path: Path) -> None:
    values = {**VALUES, "data": str(digits)}
    with held_folder(tmp_path), pytest.raises(MapetError, match="is in use by another process"):
        compare(values, tmp_path)
    (tmp_path / "letter.txt").write_text("")
    with pytest.raises(MapetError, match=r"holds 'letter.txt', but no comparison"):
        compare(values, tmp_path)
    with pytest.raises(MapetError, match="name of the output folder is empty"):
        compare(values, "")
