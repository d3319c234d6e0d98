from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mapet import MapetError
from mapet.engine.files import new_file, recover_folder, replace_file, replace_folder


def writer(text: str):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)

    return write


def content(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "b")]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "last"
    for text in ("one", "two"):
        replace_folder(target, writer(text))
        assert content(target) == [text, text]
    assert os.listdir(target.parent) == ["last"]


def test_a_failure_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "last"
    replace_folder(target, writer("one"))

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace_folder(target, fail)
    assert content(target) == ["one", "one"]
    assert os.listdir(tmp_path) == ["last"]
    (tmp_path / "file").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(tmp_path / "file", "\ud800")
    assert sorted(os.listdir(tmp_path)) == ["file", "last"]
    assert (tmp_path / "file").read_text() == "old"


KILLED_AT = """
import os, signal, sys
from pathlib import Path
import mapet.engine.files as files

# Every system call that replace_folder makes is a moment at which the process may die.
left = 0
def count(function):
    def counted(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments, **options)
    return counted
files._flush = count(files._flush)
Path.rename, Path.mkdir = count(Path.rename), count(Path.mkdir)
files.shutil.rmtree = count(files.shutil.rmtree)

def write(folder):
    for name in ("a", "b"):
        count(lambda: (folder / name).write_text("two"))()
for left, target in enumerate(sys.argv[1:]):
    process = os.fork()
    if process == 0:
        files.replace_folder(Path(target), write)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    targets = [tmp_path / str(moment) / "last" for moment in range(15)]
    for target in targets:
        replace_folder(target, writer("one"))
    ended = subprocess.run([sys.executable, "-c", KILLED_AT, *targets], capture_output=True, text=True, check=True)
    outcomes = set()
    for target, status in zip(targets, ended.stdout.split(), strict=True):
        recover_folder(target)
        found = content(target)
        assert found in (["one", "one"], ["two", "two"])
        assert os.listdir(target.parent) == ["last"]
        outcomes.add((found[0], int(status)))
    assert outcomes == {("one", -9), ("two", -9), ("two", 0)}


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    replace_folder(tmp_path / "it", lambda fresh: save_file({"x": torch.zeros(1)}, fresh / "x.safetensors"))
    (tmp_path / "plain").touch()
    assert (tmp_path / "it" / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_new_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "table.csv"
    with new_file(target) as fresh:
        fresh.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["table.csv"]
    with pytest.raises(MapetError, match=r"table\.csv is there already; choose another --out"):
        with new_file(target):
            pytest.fail("it must not be begun")
    assert target.read_text() == "whole"


def test_of_a_new_file_that_failed_nothing_is_left(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            with new_file(tmp_path / "x") as fresh:
                fresh.write_text("half")
                raise error
    assert os.listdir(tmp_path) == []


def test_a_new_file_is_made_by_one_process_in_a_folder_that_can_be_written_to(tmp_path: Path) -> None:
    with new_file(tmp_path / "x") as fresh:
        with pytest.raises(MapetError, match="x is being made by another process"):
            with new_file(tmp_path / "x"):
                pytest.fail("it must not be begun")
        fresh.write_text("whole")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x", Path("/proc/x"), tmp_path / ("x" * 300)):
        with pytest.raises(MapetError, match="cannot be written to"):
            with new_file(target):
                pytest.fail("it must not be begun")
