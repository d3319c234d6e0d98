"""Processes that load images: how they begin, and how they end."""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
    return {"num_workers": count, "worker_init_fn": begin_worker}


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


def begin_worker(worker: int) -> None:
    """Leave it to the main process to end this loading process; without it, end."""
    # Ctrl-C and hanging up reach every process of a terminal, SLURM's SIGTERM every process of a job. The main one
    # decides when to stop, and until then needs batches; workers end with it.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = _silent_when_left
    # Torch's own watch begins too late: who was orphaned while it imported waits for its new parent to end.
    when_parent_ends(partial(os._exit, 1))


def when_parent_ends(act: Callable[[], None]) -> None:
    """Call a function, in a thread, as soon as the process that started this one has ended, however it did."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        act()

    threading.Thread(target=wait, daemon=True).start()


def _silent_when_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say nothing of a main process that stopped while a batch was handed over to it; that is not the worker's news."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
