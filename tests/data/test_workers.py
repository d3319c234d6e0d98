import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

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
