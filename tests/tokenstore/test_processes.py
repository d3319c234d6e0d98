"""Writers that die, and writers side by side: real processes on real files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mapet import MapetError
from mapet.tokenstore.store import TokenStore

IMAGES = """
import hashlib, json, os, signal, sys
from pathlib import Path
import numpy as np, torch
from mapet.tokenstore import Header, TokenStore, store as module

HEADER = Header("t", "pixels", "ab" * 32, (4, 4), 8192, {"size": 28}, views=2, seed=0)

def keys(count):
    return [f"folder/{number}.jpg" for number in range(count)]

def digests(rows):
    return np.frombuffer(b"".join(hashlib.sha256(b"%d" % row).digest() for row in rows), np.uint8).reshape(-1, 32)

def write(store, rows):
    # Every seventh image is damaged.
    damaged = rows % 7 == 3
    ids = torch.from_numpy(rows[~damaged, None, None] * 31 + np.arange(32).reshape(2, 16)) % 8192
    store.write(rows[~damaged], digests(rows[~damaged]), ids)
    store.mark_damaged(rows[damaged], digests(rows[damaged]))

def encode(folder, count, batch):
    path = Path(folder)
    with (TokenStore.open(path, writable=True) if path.exists() else TokenStore.create(path, HEADER)) as store:
        for wanted in (count // 2, count):
            rows = store.plan(keys(wanted))
            left = rows[store.pending(rows, digests(rows))]
            for start in range(0, len(left), batch):
                write(store, left[start : start + batch])
                print(wanted, flush=True)
"""

KILLED_AT = f"""{IMAGES}
# Every system call that a store makes is a moment at which the process may die, and the middle of a write is another.
class Dying:
    left = 0
    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in ("pwrite", "ftruncate", "fsync"):
            return function
        def counted(*arguments):
            if self.left == 0:
                if name == "pwrite":
                    os.pwrite(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return function(*arguments)
        return counted

root, moment, outcomes = Path(sys.argv[1]), 0, []
while not outcomes or outcomes[-1]:
    child = os.fork()
    if not child:
        Dying.left, module.os = moment, Dying()
        sys.stdout = open(os.devnull, "w")
        encode(root / str(moment), 6, 2)
        os._exit(0)
    outcomes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    moment += 1
sys.stdout = open(os.devnull, "w")
encode(root / "undisturbed", 6, 2)
for moment in range(len(outcomes)):
    encode(root / str(moment), 6, 2)
sys.stdout = sys.__stdout__
print(json.dumps(outcomes))
"""

ENCODE = f"{IMAGES}\nencode(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))\n"

SIDE_BY_SIDE = f"""{IMAGES}
with TokenStore.open(sys.argv[1], writable=True) as store:
    rows = np.arange(int(sys.argv[2]), len(store), 3)
    for start in range(0, len(rows), 10):
        write(store, rows[start : start + 10])
"""

ALONE_AND_PLANNED = f"""{IMAGES}
encode(sys.argv[1], 200, 50)
with TokenStore.create(sys.argv[2], HEADER) as store:
    store.plan(keys(200))
"""


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("header.json", "index.bin", "ids.bin")}


def test_a_kill_at_any_moment_is_made_good(tmp_path: Path) -> None:
    outcomes = json.loads(run(KILLED_AT, tmp_path))
    assert len(outcomes) > 30
    assert outcomes == [-signal.SIGKILL] * (len(outcomes) - 1) + [0]
    for moment in range(len(outcomes)):
        assert contents(tmp_path / str(moment)) == contents(tmp_path / "undisturbed"), moment


def test_a_writer_killed_again_and_again_ends_with_the_same_store(tmp_path: Path) -> None:
    run(ENCODE, tmp_path / "undisturbed", 600, 16)
    kills = 0
    for batches in (3, 20):
        writer = subprocess.Popen(
            [sys.executable, "-c", ENCODE, str(tmp_path / "store"), "600", "4"], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        for _ in range(batches):
            writer.stdout.readline()
        time.sleep(0.003)
        writer.send_signal(signal.SIGSTOP)  # it might come to its end while this process is not given the CPU
        with pytest.raises(MapetError, match="is being written by another process"):
            TokenStore.open(tmp_path / "store", writable=True).plan([])
        writer.kill()
        kills += writer.wait() == -signal.SIGKILL
        report = TokenStore.open(tmp_path / "store").verify()
        assert 0 < report.written + report.damaged < 600
    assert kills == 2
    run(ENCODE, tmp_path / "store", 600, 16)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_processes_write_neighbouring_rows_at_the_same_time(tmp_path: Path) -> None:
    run(ALONE_AND_PLANNED, tmp_path / "alone", tmp_path / "store")
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(tmp_path / "store")]
    writers = [subprocess.Popen([*command, str(rank)]) for rank in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert contents(tmp_path / "store") == contents(tmp_path / "alone")
