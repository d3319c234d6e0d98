"""Real processes that are sent real signals."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mapet.cli import main
from mapet.cli.stopping import Stopped, stopped_by_signals
from mapet.errors import MapetError


def stop(arguments: list[str], number: signal.Signals, begun: Callable[[], bool], temporary: Path) -> tuple[int, str]:
    """Send a signal to the process group of a command that has begun; return its exit status and standard error."""
    command, env = [sys.executable, "-m", "mapet", *arguments], {**os.environ, "TMPDIR": str(temporary)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **streams, text=True, start_new_session=True, env=env)
    deadline = time.monotonic() + 120
    while not begun():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1]
    with pytest.raises(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, 0)
    return process.returncode, said


EMBED = ("embed", "{model}", "mnist", "--out", "{out}/f.parquet", "--workers", "1", "--batch-size", "1")
PROBE = ("eval", "attentive", "{model}", "mnist", "--out", "{out}/results", "--workers", "0")


@pytest.mark.parametrize(
    ("command", "number", "first_file"),
    [
        (EMBED, signal.SIGTERM, "out/.f.parquet.new"),
        (EMBED, signal.SIGHUP, "out/.f.parquet.new"),
        (PROBE, signal.SIGTERM, "tmp/mapet-*/training"),
    ],
)
def test_a_stopped_command_leaves_nothing(
    command: tuple[str, ...], number: signal.Signals, first_file: str, exported_vit: Path
) -> None:
    with tempfile.TemporaryDirectory() as short_name:  # sockets allow no long ones
        root = Path(short_name)
        (root / "tmp").mkdir()
        arguments = [part.format(model=exported_vit, out=root / "out") for part in command]
        status, said = stop(arguments, number, lambda: any(root.glob(first_file)), root / "tmp")
        assert said == f"mapet: stopped by {number.name}; nothing is left half-written\n"
        assert status == 128 + number
        assert os.listdir(root / "out") == []
        assert not list(root.glob("tmp/mapet-*"))


def test_a_second_signal_does_not_interrupt_the_cleaning_up() -> None:
    cleaned = []
    with pytest.raises(Stopped), stopped_by_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            try:
                Path("/no/such/file").unlink()
            except OSError:
                signal.raise_signal(signal.SIGHUP)
            cleaned.append(True)
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handled_and_ignored_signals_stay_so() -> None:
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


def test_a_forked_process_dies_silently(capfd: pytest.CaptureFixture[str]) -> None:
    with stopped_by_signals():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_it_may_be_entered_in_a_thread() -> None:
    with ThreadPoolExecutor() as pool:
        pool.submit(stopped_by_signals().__enter__).result()


def test_a_signal_hides_no_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends SIGTERM to the other processes, which may be about to say what they found."""

    def fail(arguments: list[str]) -> int:
        try:
            raise MapetError("another process ended")
        finally:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("mapet.cli._run", fail)
    assert main([]) == 128 + signal.SIGTERM
    said = capsys.readouterr().err.splitlines()
    assert said == ["mapet: error: another process ended", "mapet: stopped by SIGTERM; nothing is left half-written"]
