from __future__ import annotations

import os
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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere batches are handed over in another way")
def test_sockets_fit_into_the_longest_temporary_folder_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(SCRIPT)
    for length, said in ((75, "2"), (76, "set TMPDIR to one of at most 75 bytes, or pass --workers 0")):
        with tempfile.TemporaryDirectory(dir="/tmp") as short:
            folder = Path(short, "x" * (length - len(f"{short}/")))
            folder.mkdir()
            process = subprocess.run(
                [sys.executable, tmp_path / "load.py"], capture_output=True, text=True, timeout=120,
                env={**os.environ, "TMPDIR": str(folder)}, check=False,
            )  # fmt: skip
        assert said in process.stdout + process.stderr
