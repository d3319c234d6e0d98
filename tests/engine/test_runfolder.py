import json
from pathlib import Path

import pytest

from mapet import MapetError
from mapet.engine.runfolder import RunFolder, check_out, run_folder, run_of


def test_a_folder_that_holds_a_run_needs_resume(tmp_path: Path) -> None:
    root = tmp_path / "new" / "run"
    root.mkdir(parents=True)
    (root / "slurm-1.out").write_text("a launcher's log")
    with run_folder(root) as folder:
        folder.open(resume=False)  # this run is refused later
    with run_folder(root) as folder:
        folder.open(resume=False)
        folder.config.write_text("data: x\n")
    with pytest.raises(MapetError, match="already holds a run; pass --resume"), run_folder(root) as folder:
        folder.open(resume=False)
    with run_folder(root) as folder:
        folder.open(resume=True)
        with pytest.raises(MapetError, match="is in use by another process"):
            RunFolder(root).open(resume=True)
    found = {str(model): run_of(model) for model in (root, root / "exported", f"local-dir:{root}", tmp_path, "vit")}
    assert [run is not None and run.root == root for run in found.values()] == [True, True, True, False, False]


def test_folders_of_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(MapetError, match=f"{tmp_path} holds 'letter.txt', but no run; choose a new or empty"):
        with run_folder(tmp_path):
            pytest.fail("it must not begin")
    with pytest.raises(MapetError, match=r"letter\.txt cannot be written to .*Not a directory.*; choose another --out"):
        with run_folder(tmp_path / "letter.txt"):
            pytest.fail("it must not begin")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(MapetError, match="lies inside the image folder"):
        check_out(str(tmp_path), tmp_path / "run")


def test_records_of_later_steps_and_damaged_lines_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": step / 3}) for step in range(5)]
    damaged = ["rubbish", "5", "[1]", '{"step": "1"}', '{"loss": 1}']
    folder.metrics.write_text("\n".join([*lines, *damaged]) + '\n{"step": 5, "lo')
    assert [line["step"] for line in folder.metric_lines()] == [0, 1, 2, 3, 4]
    folder.forget_metrics_from(3)
    assert folder.metrics.read_text().splitlines() == lines[:3]


def test_a_long_history_is_read_in_part(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.some_metrics() == []
    folder.metrics.touch()
    assert folder.some_metrics() == []
    folder.forget_metrics_from(0)
    folder.metrics.write_text("".join(json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(5000)))
    assert [line["step"] for line in folder.some_metrics()] == list(range(5000))
    steps = [line["step"] for line in folder.some_metrics(most=50)]
    assert len(steps) == 50
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 4999)
    assert all(abs(step - 5000 * part / 49) < 200 for part, step in enumerate(steps))
    folder.forget_metrics_from(4990)
    assert [line["step"] for line in folder.metric_lines()] == list(range(4990))
    folder.forget_metrics_from(0)
    assert folder.metrics.read_text() == ""
