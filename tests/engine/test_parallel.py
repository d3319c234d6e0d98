"""Processes that train together, when one of them is lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import TINY, checkpoint_state, mapet_command, under_torchrun, wait_for_records

PROCESS = """
import os, sys
from datetime import timedelta
from pathlib import Path
from mapet.cli import main
from mapet.engine import parallel
parallel.STEP_PATIENCE, parallel.ROLL_CALL = timedelta(seconds=3), timedelta(seconds=1)
Path(f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
sys.exit(main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs signals that cannot be handled")
@pytest.mark.parametrize(
    ("number", "says"),
    [
        ("SIGKILL", "error: another of the processes that train together ended; its own output says why, and --resume"),
        pytest.param(
            "SIGSTOP",
            "error: process 1 of 2 kept the others waiting for 0:00:03; see its output and its machine",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_lost_process_is_one_sentence(number: str, says: str, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "process.py").write_text(PROCESS)
    values = {**TINY, "objective": "mae", "vocab_size": None, "data": str(digits), "checkpoint_every": 2}
    command = mapet_command("pretrain", values, tmp_path / "run", "--steps", "100000")
    command = under_torchrun([sys.executable, str(tmp_path / "process.py"), *command[3:]])
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_records(tmp_path / "run", 3, process)
    lost = int((tmp_path / "1.pid").read_text())
    os.kill(lost, getattr(signal, number))
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if says in line and number == "SIGSTOP":  # torchrun would wait for half a minute
            os.kill(lost, signal.SIGKILL)
    assert process.wait() == 1
    (told,) = [line for line in said if line.startswith("mapet: error:")]
    assert says in told
    traceback = [line for line in said if "Traceback" in line]
    assert len(traceback) == 1  # torchrun's own
    assert checkpoint_state(tmp_path / "run")["step"] >= 2
