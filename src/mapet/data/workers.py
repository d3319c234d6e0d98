"""Loading processes: how they start, how long they are waited for, and how they end."""

import atexit
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.multiprocessing

from mapet.errors import MapetError

Item = TypeVar("Item")

# Seconds: how often a wait for a batch is looked into, and after how long it is given up.
LOOK_EVERY, PATIENCE = 5.0, 30 * 60.0

# Bytes in the name of a socket: the most that Linux accepts, and what multiprocessing appends to the temporary folder.
LONGEST_SOCKET = 107
SOCKET = "/pymp-12345678/listener-12345678"


def loading_processes(count: int, start_method: str | None = None) -> dict[str, Any]:
    """Return the arguments of a ``DataLoader`` with ``count`` processes.

    Args:
        count: of processes; 0 to load in this one.
        start_method: how they start; see ``Source``.

    Raises:
        MapetError: if the sockets that transfer batches would get too long a name; multiprocessing would drop the
            batches silently, and the loader would wait for ever.
    """
    folder, longest = tempfile.gettempdir(), LONGEST_SOCKET - len(SOCKET)
    needs_sockets = count > 0 and torch.multiprocessing.get_sharing_strategy() == "file_descriptor"
    if needs_sockets and len(os.fsencode(folder)) > longest:
        raise MapetError(
            f"the name of the temporary folder {folder} is too long for the sockets that transfer images between "
            f"processes; set TMPDIR to one of at most {longest} bytes, or pass --workers 0"
        )
    context = start_method if count else None  # a DataLoader without processes takes none
    return {
        "num_workers": count,
        "worker_init_fn": start_worker,
        "multiprocessing_context": context,
        "timeout": LOOK_EVERY if count else 0,
    }


def patiently(
    loaded: Iterator[Item], name: str, waiting: Callable[[float], None] = lambda seconds: None
) -> Iterator[Item]:
    """Yield what a ``DataLoader`` with the arguments of ``loading_processes`` loads.

    Args:
        loaded: the iterator of the loader.
        name: of the images, for messages.
        waiting: called with the seconds since a batch was asked for, every ``LOOK_EVERY`` seconds.

    Raises:
        MapetError: without a traceback of the loading process: the one it raised, or what ended it; also if no batch
            came for ``PATIENCE`` seconds.
    """
    _explain_deaths()
    asked = time.monotonic()
    while True:
        try:
            item = next(loaded)
        except StopIteration:
            return
        except MapetError as error:
            kind = type(error)
            raise kind(str(error).strip().rpartition(f"{kind.__name__}: ")[2]) from None
        except RuntimeError as error:
            if (sentence := _explained(error)) is not None:
                raise sentence from None
            if not str(error).startswith("DataLoader timed out"):
                raise
            # The loader may be asked again after that: nothing is lost.
            waited = time.monotonic() - asked
            waiting(waited)
            if waited >= PATIENCE:
                raise MapetError(
                    f"no image came from {name} for {waited / 60:.0f} minutes; see whether the disk or the server that "
                    "holds the images answers, and run the command again (a run continues with --resume)"
                ) from None
        else:
            yield item
            asked = time.monotonic()


def _explained(error: RuntimeError) -> MapetError | None:
    """Return the sentence for what ended a loading process; None for other errors."""
    text = str(error)
    if "shared memory" in text or "signal: Bus error" in text:
        return MapetError(
            f"shared memory{_shared_memory()} is too small for the batches of the loading processes; give the "
            "container more (docker run --shm-size=16g or --ipc=host), or take a smaller --batch-size, fewer "
            "--workers or --workers 0"
        )
    if text.startswith("DataLoader worker ("):
        return MapetError(
            f"a loading process was ended from outside ({' '.join(text.split())}), most often because memory ran out; "
            "give the job more memory, or take fewer --workers or a smaller --batch-size (a run continues with "
            "--resume)"
        )
    return None


def _shared_memory() -> str:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return ""
    size = os.statvfs(folder)
    return f" ({folder}: {size.f_frsize * size.f_blocks / 2**20:.0f} MiB)"


@dataclass(frozen=True)
class _ExplainedDeaths:
    """Torch's handler of SIGCHLD, which raises where the main process happens to be, with errors in one sentence."""

    handler: Callable[[int, FrameType | None], Any]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            if (sentence := _explained(error)) is None:
                raise
            raise sentence from None


def _explain_deaths() -> None:
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and not isinstance(handler, _ExplainedDeaths):
            signal.signal(signal.SIGCHLD, _ExplainedDeaths(handler))


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread for torch, as loading processes do: the rounding of a mean depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain about each
    for child in multiprocessing.active_children():
        child.kill()


# After an error, multiprocessing's exit function sends child processes SIGTERM, which loading processes ignore, and
# waits for them. This function is registered later and therefore runs earlier.
atexit.register(_kill_workers)


def start_worker(worker: int) -> None:
    """Let a loading process end only with the main process."""
    # Ctrl-C and SIGHUP reach every process of a terminal, and SLURM's SIGTERM every process of a job. The main process
    # decides when to stop, and needs batches until then.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = _hide_lost_connections
    # Torch's own watch starts too late: if the main process ends while a loading process imports torch, the watch
    # waits for the process that adopted it.
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    main_process.join()
    os._exit(1)


def _hide_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print no traceback when the main process stopped while a batch was sent to it."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
