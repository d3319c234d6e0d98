"""The batch files of examples/slurm, with a launcher that starts the processes as SLURM's does."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TINY, checkpoint_state, mapet_command, pretrain_tiny, records, wait_for_records

BATCH = Path(__file__).parents[2] / "examples" / "slurm" / "pretrain.sbatch"

# Like srun, it numbers the processes, passes a signal on to all of them, and exits with the highest status.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}) for i in range(2)
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
statuses = [task.wait() for task in tasks]
open("statuses", "w").write(str(statuses))
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "$@" > requeued; fi
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    programs = {"srun": SRUN, "scontrol": SCONTROL, "mapet": f'#!/bin/sh\nexec {sys.executable} -m mapet "$@"\n'}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "localhost", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SLURM_CPUS_PER_TASK": "1", **{f"SLURM_{k}": v for k, v in slurm.items()}}


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
@pytest.mark.slow
def test_a_requeued_job_continues_the_run(digits: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    values: dict[str, Any] = {"objective": "mae", "vocab_size": None, "steps": 20, "precision": "no"}
    out = tmp_path / "run"
    arguments = mapet_command("pretrain", {**TINY, "data": str(digits), **values}, out)[4:]

    def start() -> subprocess.Popen[str]:
        command = ["bash", str(BATCH), *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    job = start()
    wait_for_records(out, 2, job)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 138
    assert (tmp_path / "statuses").read_text() == "[138, 138]"
    assert (tmp_path / "requeued").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    assert "Traceback" not in said
    assert 2 <= checkpoint_state(out)["step"] < 20

    (tmp_path / "requeued").unlink()
    job = start()
    said = job.communicate(timeout=120)[1]
    assert job.returncode == 0, said
    assert not (tmp_path / "requeued").exists()
    pretrain_tiny(digits, tmp_path / "whole", **values)
    one, other = records(out), records(tmp_path / "whole")
    assert [record["step"] for record in one] == list(range(20))
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
