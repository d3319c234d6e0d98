from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from mapet import MapetError
from mapet.engine.runfolder import RunFolder, explain_disk_errors


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    folder.open(resume=False)
    folder.config.write_text("data: x\n")
    folder.close()
    folder.open(resume=True)
    folder.close()
    with pytest.raises(MapetError, match=r"already holds a run; pass --resume"):
        folder.open(resume=False)


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(MapetError, match=f"{tmp_path} holds 'letter.txt', but no run; choose a new or empty"):
            RunFolder(tmp_path).open(resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(MapetError, match="letter.txt is a file; choose a folder"):
        RunFolder(tmp_path / "letter.txt").open(resume=False)


def test_an_empty_folder_and_one_that_was_refused_before_are_taken(tmp_path: Path) -> None:
    for _ in range(2):
        folder = RunFolder(tmp_path)
        folder.open(resume=False)
        folder.log.write_text("refused")
        folder.close()


def test_the_log_of_a_launcher_may_be_there_first(tmp_path: Path) -> None:
    (tmp_path / "slurm-1.out").write_text("begins")
    RunFolder(tmp_path).open(resume=False)


def test_one_process_a_folder(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open(resume=False)
    with pytest.raises(MapetError, match="is in use by another process"):
        second.open(resume=True)
    first.close()
    second.open(resume=True)
    second.close()


def test_metrics_are_cut_back_and_half_lines_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": step / 3}) for step in range(5)]
    edited = ['{"step": "1"}', '{"step": 1.5}', '{"loss": 1}', '{"step": 1, "loss": "x"}', "[1]", '{"step": NaN}']
    folder.metrics.write_text("\n".join([*lines, "rubbish", "5", *edited]) + '\n{"step": 5, "lo')
    assert [line["step"] for line in folder.metric_lines()] == [0, 1, 2, 3, 4]
    folder.forget_metrics_from(3)
    assert folder.metrics.read_text().splitlines() == lines[:3]


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")]
)
def test_disk_errors_become_sentences(tmp_path: Path, number: int, says: str) -> None:
    with pytest.raises(MapetError, match=f"cannot write to .*a.txt: .*{says}.*what was saved before is whole"):
        with explain_disk_errors(tmp_path):
            raise OSError(number, "reason", str(tmp_path / "a.txt"))
    with pytest.raises(MapetError, match="cannot open /elsewhere/b.txt"), explain_disk_errors(tmp_path):
        raise OSError(number, "reason", "/elsewhere/b.txt")
    with pytest.raises(MapetError, match="a.txt in the output folder is not what"), explain_disk_errors(tmp_path):
        raise IsADirectoryError(errno.EISDIR, "reason", str(tmp_path / "a.txt"))
    with pytest.raises(OSError, match="reason"), explain_disk_errors(tmp_path):
        raise OSError(errno.EIO, "reason")
