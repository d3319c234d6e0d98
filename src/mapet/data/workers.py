"""Processes that load images: how they begin, and how they end."""

from __future__ import annotations

import atexit
import multiprocessing.util
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing

from mapet.errors import MapetError

# Of a socket's name, as the system takes it, and what multiprocessing appends to the temporary folder for one.
LONGEST_SOCKET = 107
SOCKET = "/pymp-12345678/listener-12345678"


def loading_processes(count: int) -> dict[str, Any]:
    """Return the arguments of a ``DataLoader`` with so many processes.

    Raises:
        MapetError: if batches could not be handed over: multiprocessing would drop them, and the loader wait for ever.
    """
    folder = tempfile.gettempdir()
    if count and torch.multiprocessing.get_sharing_strategy() == "file_descriptor":
        longest = LONGEST_SOCKET - len(SOCKET)
        if len(folder.encode(errors="surrogateescape")) > longest:
            raise MapetError(
                f"the name of the temporary folder {folder} is too long for the sockets by which processes hand over "
                f"images; set TMPDIR to one of at most {longest} bytes, or pass --workers 0"
            )
    return {"num_workers": count, "worker_init_fn": ignore_stops}


@contextmanager
def one_thread() -> Iterator[None]:
    """As in a loading process: a mean's rounding depends on the number of threads; small images are not worth more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _end_workers() -> None:
    for child in multiprocessing.active_children():
        child.kill()


# After an error, Python waits for its child processes, having asked them to stop by the very signal that loading
# processes ignore. Registered after multiprocessing's own exit function, it runs before it.
atexit.register(_end_workers)


def ignore_stops(worker: int) -> None:
    """Leave it to the main process to end a loading process."""
    # Ctrl-C and hanging up reach every process of a terminal, SLURM's SIGTERM every process of a job. The main one
    # decides when to stop, and until then needs batches; workers end with it by themselves.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = _silent_when_left


def _silent_when_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say nothing of a main process that stopped while a batch was handed over to it; that is not the worker's news."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
