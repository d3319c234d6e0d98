from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from mapet.engine.runfolder import held_folder
from mapet.jobs.compare import grid
from mapet.jobs.compare.cells import Cell, read_record
from mapet.jobs.compare.grid import finish_cells

DONE = {"cost": {"steps": 0, "flops": 0, "seconds": 0, "memory": 0}}


def held_cell(root: Path) -> Cell:
    return Cell("mim", "mim", "", 0, {"objective": "mim"}, None, 0.0, root, budgets=("steps",))


@pytest.mark.parametrize("record", [DONE, {"failed": "its memory ran out"}])
def test_what_another_process_works_on_is_waited_for(
    record: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "POLL_S", 0.05)
    tmp_path.joinpath("cell.json").write_text(json.dumps({"failed": "another time"}))
    is_held = threading.Event()

    def work_on_it() -> None:
        with held_folder(tmp_path, ".claim"):
            is_held.set()
            time.sleep(0.5)
            tmp_path.joinpath("cell.json").write_text(json.dumps(record))

    threading.Thread(target=work_on_it).start()
    is_held.wait()
    began = time.monotonic()
    assert list(finish_cells([held_cell(tmp_path)])) == []
    assert time.monotonic() - began > 0.4


def test_what_is_done_is_passed_over(tmp_path: Path) -> None:
    tmp_path.joinpath("cell.json").write_text(json.dumps(DONE))
    assert list(finish_cells([held_cell(tmp_path)])) == []
    assert not tmp_path.joinpath(".claim").exists()


def test_a_reason_longer_than_a_pipe_holds_is_kept_whole(tmp_path: Path) -> None:
    values = {"objective": "mim", "data": "x" * 200_000}
    (cell,) = finish_cells([Cell("mim", "mim", "", 0, values, None, 0.0, tmp_path, budgets=("steps",))])
    assert values["data"] in read_record(cell.root)["failed"]
