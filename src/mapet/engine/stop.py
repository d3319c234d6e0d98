"""Stopping on SIGTERM, SIGINT, SIGHUP or SIGUSR1: the current step is finished and saved."""

import logging
import signal
import threading
from types import FrameType
from typing import Any, Self

logger = logging.getLogger(__name__)


class StopRequest:
    """While entered, the first of ``SIGNALS`` sets ``signal``; a second one has its usual effect.

    A signal that the process ignores stays ignored. Outside the main thread Python delivers no signals, so nothing is
    ever requested there.
    """

    # SIGUSR1 is what SLURM is usually told to send before the time is up (``--signal=USR1@120``). Windows lacks two.
    SIGNALS = frozenset(
        getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
    )

    GRACE = 60.0  # seconds in which slow images may still come

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._take) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def insist(self, seconds: float) -> None:
        """Let the signal that came, if one did, have its usual effect: a step has waited so long for its images."""
        if self.signal is not None and seconds >= self.GRACE:
            logger.warning("stopping without saving: the images of this step have not come for %.0f s", seconds)
            signal.raise_signal(self.signal)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        logger.warning("%s: stopping when this step is saved; once more stops at once", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
