"""Stopping on SIGTERM, SIGINT or SIGHUP: the current step is finished and saved."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """While entered, the first SIGTERM, SIGINT or SIGHUP sets ``signal``; a second one has its usual effect.

    A signal that the process ignores stays ignored. Outside the main thread Python delivers no signals, so nothing is
    ever requested there.
    """

    SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)))

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal asked to stop."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._take) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        logger.warning("%s: stopping when this step is saved; once more stops at once", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
