"""SIGTERM and SIGHUP unwind a command as Ctrl-C does: what is temporary is removed, nothing stays half-written."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))  # Windows knows no terminal that hangs up


class Stopped(BaseException):
    """A signal asked the process to end. Like KeyboardInterrupt not an Exception, lest it be taken for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """While entered, a signal that would kill the process raises ``Stopped`` in its main thread instead.

    A signal that is ignored, as under nohup, or that has a handler stays as it is. Training has its own handlers in
    the meantime, see ``mapet.engine.StopRequest``.

    Raises:
        Stopped: in the body.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers nowhere else
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a loading process inherits the handler, but has nothing to clear up
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # Launchers and terminals send it twice; the second must not interrupt the clearing up after the first.
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
    """Whether an exception, or one during whose handling it was raised, is ``Stopped``."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None
