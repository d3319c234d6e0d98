"""Where the trainer's records go. A sink knows no metric by name: it writes what it is given.

To add one (Weights & Biases, say), write a class with these three methods and name it in ``SINKS``.
"""

import json
import logging
import math
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from mapet.engine.runfolder import RunFolder

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class Sink(Protocol):
    """Receives one record per logged step."""

    def begin(self, folder: RunFolder, first_step: int, total_steps: int) -> None:
        """Get ready for a run.

        Args:
            folder: of the run; it holds the configuration.
            first_step: steps done before; records of this and later steps, left by a killed run, are to be dropped.
            total_steps: of the whole run.
        """

    def write(self, record: Record) -> None:
        """Take a record; it holds at least ``step``. Measurements add keys at some steps only."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """Appends records to ``metrics.jsonl``, one line each, visible at once to whoever follows the file."""

    _file: TextIO

    def begin(self, folder: RunFolder, first_step: int, total_steps: int) -> None:
        """Open the file, without the records of steps that are computed again."""
        if folder.metrics.exists():
            folder.forget_metrics_from(first_step)
        elif first_step:
            logger.warning("%s is gone: the curve begins at step %d", folder.metrics, first_step)
        self._file = folder.metrics.open("a")

    def write(self, record: Record) -> None:
        """Append one line."""
        # JSON has neither NaN nor infinity.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes numbers as TensorBoard scalars."""

    _writer: Any

    def begin(self, folder: RunFolder, first_step: int, total_steps: int) -> None:
        """Open the events."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=first_step)

    def write(self, record: Record) -> None:
        """Write each number of the record."""
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


# What every run writes to, besides the terminal.
SINKS: dict[str, Callable[[], Sink]] = {"jsonl": JsonLines, "tensorboard": TensorBoard}
