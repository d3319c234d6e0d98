import json
import signal
import subprocess
import sys
from pathlib import Path

KILLED_AT = """
import json, os, signal, sys
from pathlib import Path
import numpy as np, torch
from mapet.tokenstore import arrays, store as module
from mapet.tokenstore.store import Header, State, TokenStore

HEADER = Header(tokenizer="t", tokenizer_hash="ab" * 32, grid=(4, 4), vocab_size=8192, view={}, views=2, seed=0)

def encode(folder):
    has_store = (folder / "header.json").exists()
    store = TokenStore(folder) if has_store else TokenStore.create(folder, HEADER)
    for keys in ("abc", "abcdef"):
        store.append(keys)
        rows = store.find(keys)
        states = store.states(rows)
        rows = rows[(states == State.EMPTY) | (states == State.CORRUPT)]
        if len(rows):
            ids = torch.from_numpy(rows[:, None, None] * 31 + np.arange(32).reshape(2, 16))
            store.write(rows, np.full((len(rows), 32), 9, np.uint8), ids, rows != 4)

# The process is killed before every line that touches files.
left = 0

def trace(frame, event, argument):
    global left
    code = frame.f_code
    if code.co_filename not in (arrays.__file__, module.__file__) or code.co_name not in ("create", "grow", "write"):
        return None
    if event == "line":
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    return trace

root, outcomes = Path(sys.argv[1]), []
while not outcomes or outcomes[-1]:
    folder = root / str(len(outcomes))
    folder.mkdir()
    child = os.fork()
    if not child:
        left = len(outcomes)
        sys.settrace(trace)
        encode(folder)
        os._exit(0)
    outcomes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    encode(folder)
print(json.dumps(outcomes))
"""


def test_a_store_is_completed_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AT, str(tmp_path)]
    outcomes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(outcomes) > 50
    assert outcomes == [-signal.SIGKILL] * (len(outcomes) - 1) + [0]
    for name in ("header.json", "ids.npy", "images.npy"):
        undisturbed = (tmp_path / str(len(outcomes) - 1) / name).read_bytes()
        assert all((tmp_path / str(moment) / name).read_bytes() == undisturbed for moment in range(len(outcomes)))
