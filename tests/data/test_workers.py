import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tests.conftest import QUIET, TINY, checkpoint_state, mapet_command, wait_for_records
from torch.utils.data import Dataset

from mapet.errors import MapetError
from mapet.jobs.pretrain.run import pretrain

SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader
from mapet.data.workers import loading_processes
if __name__ == "__main__":
    print(len(list(DataLoader(torch.zeros(4, 8), batch_size=2, **loading_processes(1)))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not use sockets")
def test_a_temporary_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(SCRIPT)
    for length, output in ((75, "2"), (76, "set TMPDIR to one of at most 75 bytes, or pass --workers 0")):
        with tempfile.TemporaryDirectory(dir="/tmp") as short:
            folder = Path(short, "x" * (length - len(f"{short}/")))
            folder.mkdir()
            env = {**os.environ, "TMPDIR": str(folder)}
            command = [sys.executable, tmp_path / "load.py"]
            process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        assert output in process.stdout + process.stderr


ORPHAN = """
import os, signal, time
from torch.utils.data import DataLoader
from mapet.data.workers import loading_processes
if __name__ == "__mp_main__":
    time.sleep(2)  # the main process is killed while the loading process imports
    print("imported", flush=True)
if __name__ == "__main__":
    loader = iter(DataLoader([0], **loading_processes(1, "spawn")))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be handled")
def test_a_loading_process_ends_if_the_main_process_is_killed_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(ORPHAN)
    process = subprocess.Popen([sys.executable, tmp_path / "load.py"], stdout=subprocess.PIPE, text=True)
    # Both processes hold the pipe: communicate returns when both have ended.
    assert process.communicate(timeout=60)[0] == "imported\n"
    assert process.returncode == -signal.SIGKILL


def _tiny(data: Path, out: Path, *flags: str) -> list[str]:
    return mapet_command("pretrain", {**TINY, "objective": "mae", "vocab_size": None, "data": str(data)}, out, *flags)


class Failing(Dataset[Image.Image]):
    """Grey images; the 20th that a loading process is asked for never comes, or is its end."""

    def __init__(self, failure: Callable[[], object]) -> None:
        self.failure, self.asked = failure, 0

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Image.Image:
        self.asked += 1
        if self.asked == 20:
            self.failure()
        return Image.new("L", (28, 28), index)


def _train_failing(out: Path, failure: Callable[[], object]) -> None:
    values = {key: value for key, value in TINY.items() if key != "vocab_size"}
    pretrain({**values, "objective": "mae", "data": Failing(failure), "workers": 1, "steps": 9}, out, console=QUIET)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be handled")
def test_a_loading_process_that_is_killed_is_one_sentence(tmp_path: Path) -> None:
    """The system kills a process when memory runs out; the main process may be anywhere in a step then."""
    killed = r"a loading process was ended from outside \(.*\), most often because memory ran out; .*--workers"
    with pytest.raises(MapetError, match=killed):
        _train_failing(tmp_path / "run", lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_images_that_never_come_are_waited_for_with_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapet.data.workers.LOOK_EVERY", 0.2)
    monkeypatch.setattr("mapet.data.workers.PATIENCE", 1.0)
    with pytest.raises(MapetError, match="no image came from .* for 0 minutes; see whether the disk"):
        _train_failing(tmp_path / "run", lambda: time.sleep(1000))
    assert checkpoint_state(tmp_path / "run")["step"] == 2
    for process in multiprocessing.active_children():
        process.kill()


STALLED = """
import logging, sys, time
from pathlib import Path
from tests.data import test_workers
from mapet.data import workers
from mapet.engine.stop import StopRequest

workers.LOOK_EVERY, StopRequest.GRACE = 0.2, 0.5
logging.basicConfig(level=logging.INFO)
test_workers._train_failing(Path("run"), lambda: time.sleep(1000))
"""


def test_a_signal_is_heeded_while_images_do_not_come(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(STALLED)
    process = subprocess.Popen(
        [sys.executable, "main.py"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    wait_for_records(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert "stopping without saving: the images of this step have not come for" in said
    assert process.returncode == -signal.SIGTERM


SMALL = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]


@pytest.mark.skipif(
    shutil.which("unshare") is None or bool(subprocess.run([*SMALL, "true"], capture_output=True).returncode),
    reason="needs the right to mount",
)
def test_too_little_shared_memory_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    """A container has 64 MiB of it, unless told otherwise."""
    command = _tiny(
        digits, tmp_path / "run", "--steps", "2", "--workers", "1", "--image-size", "448", "--patch-size", "56"
    )
    process = subprocess.run([*SMALL, *command], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert "error: shared memory (/dev/shm: 1 MiB) is too small for the batches" in process.stderr
    assert "--shm-size=16g or --ipc=host" in process.stderr
