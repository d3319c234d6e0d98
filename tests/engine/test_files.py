import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mapet import MapetError
from mapet.engine.files import (
    claimed_folder,
    explain_disk_errors,
    find_folder,
    new_file,
    recover_folder,
    replace_file,
    replace_folder,
)


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).touch(mode=0o600)  # as safetensors does
            (folder / name).write_text(text)

    return write


def content(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "b")]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "last"
    for text in ("one", "two"):
        replace_folder(target, writer(text))
        assert content(target) == [text, text]
    assert os.listdir(target.parent) == ["last"]
    (tmp_path / "plain").touch()
    assert (target / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode  # as the umask says


def test_a_failure_leaves_the_old_content(tmp_path: Path) -> None:
    replace_folder(tmp_path / "last", writer("one"))
    with pytest.raises(ZeroDivisionError):
        replace_folder(tmp_path / "last", lambda fresh: (fresh / str(1 / 0)).touch())
    assert content(tmp_path / "last") == ["one", "one"]
    replace_file(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "last"]


KILLED_AT = """
import os, signal, sys
from pathlib import Path
import mapet.engine.files as files

# The process may die before each system call of replace_folder.
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
        before = find_folder(target)
        assert before is not None
        found = content(before)
        recover_folder(target)
        assert found == content(target)
        assert found in (["one", "one"], ["two", "two"])
        assert os.listdir(target.parent) == ["last"]
        outcomes.add((found[0], int(status)))
    assert outcomes == {("one", -9), ("two", -9), ("two", 0)}


def test_a_new_file_gets_its_name_when_it_is_whole_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "table.csv"
    with new_file(target) as fresh:
        fresh.write_text("whole")
        assert not target.exists()
        with pytest.raises(MapetError, match=r"table\.csv is in use by another process"), new_file(target):
            pytest.fail("it must not begin")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), new_file(target.with_name("half")) as fresh:
            fresh.write_text("half")
            raise error
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["table.csv"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(MapetError, match="empty is a folder; choose another --out"), new_file(tmp_path / "empty"):
        pytest.fail("it must not begin")
    with claimed_folder(tmp_path / "empty"):
        replace_folder(tmp_path / "empty", writer("whole"))


@pytest.mark.parametrize("claim", [new_file, claimed_folder])
def test_output_that_cannot_be_written_is_refused(claim: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target, says in (
        (tmp_path / "file", "file is there already.*; choose another --out"),
        (tmp_path / "link", "link is there already.*; choose another --out"),
        (tmp_path / "file" / "x", "cannot be written to"),
        (Path("/proc/x"), "cannot be written to"),
        (tmp_path / ("x" * 300), "cannot be written to"),
    ):
        with pytest.raises(MapetError, match=says), claim(target):
            pytest.fail("it must not begin")


def test_disk_errors_become_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = f"output folder {tmp_path} cannot be written to "
    full = refused + r"\(.*full.*\); free some space or raise the limit; what was saved is whole"
    for error, expected, says in (
        (OSError(errno.ENOSPC, "full"), MapetError, full),
        (SafetensorError("I/O error: full (os error 28)"), MapetError, full),
        (OSError(errno.EROFS, "", "a.txt"), MapetError, refused + r"\(.*'a.txt'\); choose another --out"),
        (OSError(errno.EISDIR, "", "a.txt"), MapetError, refused + r"\(.*'a.txt'\); choose another --out"),
        (OSError(errno.EACCES, "", "/elsewhere/b.txt"), OSError, "/elsewhere/b.txt"),
        (SafetensorError("header too small"), SafetensorError, "header too small"),
    ):
        with pytest.raises(expected, match=says), explain_disk_errors(tmp_path):
            raise error
