"""Loading processes: how they start, and how they end."""

import atexit
import multiprocessing.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.multiprocessing

from mapet.errors import MapetError

Item = TypeVar("Item")

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
    return {"num_workers": count, "worker_init_fn": start_worker, "multiprocessing_context": context}


def in_one_sentence(loaded: Iterator[Item]) -> Iterator[Item]:
    """Yield what a ``DataLoader`` loads; a MapetError of a loading process comes without that process's traceback."""
    try:
        yield from loaded
    except MapetError as error:
        kind = type(error)
        raise kind(str(error).strip().rpartition(f"{kind.__name__}: ")[2]) from None


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
