"""SIGTERM and SIGHUP end a command like Ctrl-C: temporary files are removed, nothing stays half-written."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # Windows has no SIGHUP


class Stopped(BaseException):
    """A signal asked the process to end. Like KeyboardInterrupt it is no Exception: it is not a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """While entered, a signal that would kill the process raises ``Stopped`` in its main thread instead.

    A signal that is ignored (under nohup) or has another handler keeps it. Training has its own handlers, see
    ``mapet.engine.stop.StopRequest``.

    Raises:
        Stopped: in the body.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a loading process inherits the handler and has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # Launchers and terminals send signals twice; the second must not interrupt the cleaning up.
        elif not _unwinding(sys.exception()):
            raise Stopped(number)

    caught = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _unwinding(error: BaseException | None) -> bool:
    """Return whether an exception or one of its contexts is ``Stopped``."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None
