from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import TINY

from mapet import MapetError
from mapet.engine.runfolder import held_folder
from mapet.jobs.compare.run import compare, join_comparison

VALUES = {**TINY, "objectives": ["mim", "random"], "seeds": 1, "steps": 4, "budget": ["steps"], "measures": ["knn"]}


def written(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_cell_that_fails_stops_no_other_and_what_is_done_is_not_done_again(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    bold = {"bold": {"objective": "mim", "lr": 1e3, "weight_decay": 1e3}}
    found = compare({**VALUES, "arms": bold, "data": str(digits)}, out)
    assert [(row.name, row.seed) for row in found.rows] == [("mim, pixels", 0), ("random", 0)]
    assert all(0 <= row.measured["knn"] <= 1 for row in found.rows)
    mim, untrained = (row.cost for row in found.rows)
    assert mim["steps"] == 4
    assert mim["flops"] > 0
    assert mim["seconds"] > 0
    assert 2**28 < mim["memory"] < 2**34
    assert untrained["flops"] == 0
    assert [len(row.curve) for row in found.rows] == [4, 0]

    assert list(found.failures) == ["bold, pixels, seed 0, equal steps"]
    assert "start another run with a lower --lr" in found.failures["bold, pixels, seed 0, equal steps"]
    assert [(row["arm"], row["budget"], row["steps"]) for row in written(out)] == [
        ("mim", "steps", "4"),
        ("random", "steps", "0"),
    ]
    page = (out / "report.html").read_text()
    assert "mim, pixels" in page
    assert "data:image/png;base64" in page
    table = (out / "results.md").read_text()
    assert "One seed: there is no spread" in table
    assert "| bold, pixels | - |" in table
    assert "Failed: bold, pixels, seed 0, equal steps: " in table

    with pytest.raises(MapetError, match="holds a comparison; pass --resume"):
        compare({**VALUES, "data": str(digits)}, out)
    more = {"arms": {}, "measures": ["knn", "linear"], "linear": {"steps": 5, "lr": [0.3], "weight_decay": [1e-3]}}
    extended = compare(more, out, resume=True)
    assert not extended.failures
    assert [row.cost for row in extended.rows] == [mim, untrained]
    for row, before in zip(extended.rows, found.rows, strict=True):
        assert row.measured["knn"] == before.measured["knn"]
        assert 0 <= row.measured["linear"] <= 1
    moved = out.rename(tmp_path / "moved")
    times = {path: path.stat().st_mtime_ns for path in moved.rglob("cell.json")}
    linear = {"steps": 5, "lr": (0.3,), "weight_decay": (1e-3,)}  # of Python; in files they are lists
    assert compare({"linear": linear, "workers": 1}, moved, resume=True).rows == extended.rows
    assert {path: path.stat().st_mtime_ns for path in moved.rglob("cell.json")} == times

    for content in ("[]", '{"cost": 3}', '{"knn": {"keys": {}}}'):
        next(iter(times)).write_text(content)
        with pytest.raises(MapetError, match=r"cell.json is damaged; remove the file"):
            compare({}, moved, resume=True)


def test_the_learning_rate_that_does_best_on_held_out_images_is_taken(digits: Path, tmp_path: Path) -> None:
    values = {key: value for key, value in VALUES.items() if key != "lr"}
    asked = {**values, "lrs": [1e-5, 1e3], "weight_decay": 1e3, "data": str(digits)}
    found = compare(asked, tmp_path)
    assert [(row.name, row.seed) for row in found.rows] == [("mim, pixels", 0), ("random", 0)]
    assert list(found.rates) == ["mim, pixels"]
    assert list(found.rates["mim, pixels"].held_out) == [1e-5]
    assert list(found.failures) == ["mim, pixels, learning rate 1000 on trial"]
    run = next((tmp_path / "cells").glob("mim-pixels-seed0-*/run/config.yaml"))
    assert yaml.safe_load(run.read_text())["lr"] == 1e-5
    assert [line["lr"] for line in written(tmp_path)] == ["1e-05", ""]

    trial = next((tmp_path / "cells").glob("mim-pixels-seed1000-*/cell.json"))
    record = json.loads(trial.read_text())
    trial.write_text(json.dumps({**record, "knn": {"accuracy": 0.5, "held_out": None}}))
    with pytest.raises(MapetError, match=r"cell.json is damaged; remove the file"):
        compare({}, tmp_path, resume=True)


@pytest.mark.slow
def test_killed_and_begun_again_it_ends_with_the_same_table(digits: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        **VALUES,
        "objectives": ["mapet", "mim", "random"],
        "steps": 300,
        "checkpoint_every": 5,
        "data": str(digits),
    }
    whole = compare(values, tmp_path / "whole")
    script = tmp_path / "run.py"
    script.write_text(
        "from mapet.jobs.compare.run import compare\n"
        f"if __name__ == '__main__':\n    compare({values!r}, {str(tmp_path / 'killed')!r}, resume=True)\n"
    )
    for number, sign in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
        awaited = "*/run/metrics.jsonl" if number < 2 else "mim*/run/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed" / "cells").glob(awaited)) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sign)
        process.wait(timeout=120)
    found = compare({}, tmp_path / "killed", resume=True)
    assert found.failures == {}
    assert [(row.name, row.measured) for row in found.rows] == [(row.name, row.measured) for row in whole.rows]
    assert [row.curve for row in found.rows] == [row.curve for row in whole.rows]
    assert (
        json.loads(next((tmp_path / "killed" / "cells").glob("mapet*/cell.json")).read_text())["cost"]["steps"] == 300
    )


def test_what_is_refused_leaves_nothing(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    for values, sentence in (
        ({**VALUES, "data": str(digits), "tokens": "store"}, "'tokens' is for mapet pretrain"),
        ({**VALUES, "data": str(digits / "class 0")}, "subfolder"),
        ({**VALUES, "data": str(digits), "budget": ["hours"]}, "'hours' names no budget"),
        ({**VALUES, "data": str(digits), "seeds": 0}, "seeds = 0"),
        ({**VALUES, "data": str(digits), "lrs": [1e-3, 2e-3], "lr": 1e-3}, "lr and lrs are both given"),
        ({**VALUES, "data": str(digits), "measure": ["knn"]}, "unknown key 'measure'; did you mean 'measures'"),
    ):
        with pytest.raises(MapetError, match=sentence):
            compare(values, out)
        assert not out.exists()
    with pytest.raises(MapetError, match="name of the output folder is empty"):
        compare({**VALUES, "data": str(digits)}, "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    with pytest.raises(MapetError, match=r"holds 'letter.txt', but no comparison"):
        compare({**VALUES, "data": str(digits)}, tmp_path / "mine")


def test_processes_that_join_share_the_cells_and_end_with_the_same_table(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    values = {**VALUES, "objectives": ["mapet", "mim"], "steps": 40, "data": str(digits)}
    script = tmp_path / "run.py"
    script.write_text(
        "from mapet.jobs.compare.run import compare\n"
        f"if __name__ == '__main__':\n    compare({values!r}, {str(out)!r})\n"
    )
    moved = shutil.copytree(digits, tmp_path / "as another machine sees it")
    first = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((out / "cells").glob("*/.claim")) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = join_comparison({"data": str(moved), "workers": 0}, out)
    said = str(first.communicate(timeout=120)[1])
    assert first.returncode == 0
    assert "Traceback" not in said
    assert [row.name for row in found.rows] == ["mapet, pixels", "mim, pixels"]
    assert [line["knn"] for line in written(out)] == [str(row.measured["knn"]) for row in found.rows]
    configs = [yaml.safe_load(path.read_text()) for path in sorted((out / "cells").glob("*/run/config.yaml"))]
    assert [config["data"] for config in configs] == [str(digits), str(moved)], "each has done one of the two cells"
    assert len(list((out / "tokenizers").glob("pixels-*"))) == 1

    next(moved.rglob("*.png")).unlink()
    with pytest.raises(MapetError, match="has the images of .* their number or names differ"):
        join_comparison({"data": str(moved)}, out)
    with pytest.raises(MapetError, match="joined as it is, but 'seeds' would make it another"):
        join_comparison({"seeds": 2}, out)
    with pytest.raises(MapetError, match=r"mine' holds no comparison to join; begin it first"):
        join_comparison({}, tmp_path / "mine")


def test_one_process_a_comparison(digits: Path, tmp_path: Path) -> None:
    with held_folder(tmp_path), pytest.raises(MapetError, match="is in use by another process"):
        compare({**VALUES, "data": str(digits)}, tmp_path)
