"""Real processes that are sent real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mapet.cli.stopping import Stopped, stopped_by_signals


def stop(arguments: list[str], number: signal.Signals, begun: Callable[[], bool], temporary: Path) -> tuple[int, str]:
    """Start a command, send a signal to its process group when it has begun; return exit status and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mapet", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    deadline = time.monotonic() + 120
    while not begun():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1]
    with pytest.raises(ProcessLookupError):  # of the group nothing is left
        os.killpg(process.pid, 0)
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_embedding_with_loading_processes_stops_and_leaves_nothing(
    number: signal.Signals, exported_vit: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "f.parquet"
    command = ["embed", str(exported_vit), "mnist", "--out", str(out), "--workers", "1", "--batch-size", "1"]
    with tempfile.TemporaryDirectory() as temporary:  # of a name short enough for sockets
        status, said = stop(command, number, lambda: (out.parent / ".f.parquet.new").exists(), Path(temporary))
    assert said == f"mapet: stopped by {number.name}; nothing is left half-written\n"
    assert status == 128 + number
    assert os.listdir(out.parent) == []


def test_an_attentive_probe_removes_its_store(exported_vit: Path, tmp_path: Path) -> None:
    out, temporary = tmp_path / "out" / "results", tmp_path / "tmp"
    temporary.mkdir()
    command = ["eval", "attentive", str(exported_vit), "mnist", "--out", str(out), "--workers", "0"]
    begun = lambda: any(temporary.glob("mapet-*/training"))  # noqa: E731
    status, said = stop(command, signal.SIGTERM, begun, temporary)
    assert said == "mapet: stopped by SIGTERM; nothing is left half-written\n"
    assert status == 143
    assert os.listdir(out.parent) == []
    assert not list(temporary.glob("mapet-*"))


def test_the_second_signal_does_not_interrupt_the_clearing_up() -> None:
    cleared = []
    with pytest.raises(Stopped), stopped_by_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            try:
                Path("/no/such/file").unlink()
            except OSError:
                signal.raise_signal(signal.SIGHUP)
            cleared.append(True)
    assert cleared == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_handled_or_ignored_stays_so() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, hangup)
    assert seen == [signal.SIGTERM]


def test_a_forked_process_dies_of_it_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with stopped_by_signals():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_it_may_be_entered_in_a_thread() -> None:
    entered = []

    def enter() -> None:
        with stopped_by_signals():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]
