"""Where the trainer's records go. A sink knows no metric by name: it writes what it is given.

To add one (Weights & Biases, say), write a class with these three methods and name it in ``SINKS``.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from mapet.config.base import Config
from mapet.engine.runfolder import RunFolder

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """What a sink is told before the first record.

    Attributes:
        folder: of the run.
        config: settled.
        first_step: steps done before; a sink drops the records of this and later steps that a
            killed run left.
        total_steps: of the whole run.
    """

    folder: RunFolder
    config: Config
    first_step: int
    total_steps: int


class Sink(Protocol):
    """Receives one record per logged step."""

    def begin(self, run: RunFacts) -> None:
        """Get ready for a run."""

    def write(self, record: Record) -> None:
        """Take a record; it holds at least ``step``. Measurements add keys at some steps only."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """Appends records to ``metrics.jsonl``, one line each, visible at once to whoever follows the file."""

    _file: TextIO

    def begin(self, run: RunFacts) -> None:
        """Open the file, without the records of steps that are computed again."""
        if run.folder.metrics.exists():
            run.folder.forget_metrics_from(run.first_step)
        elif run.first_step:
            logger.warning("%s is gone: the curve begins at step %d", run.folder.metrics, run.first_step)
        self._file = run.folder.metrics.open("a")

    def write(self, record: Record) -> None:
        """Append one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes numbers as TensorBoard scalars."""

    _writer: Any

    def begin(self, run: RunFacts) -> None:
        """Open the events."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(run.folder.tensorboard), purge_step=run.first_step)

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
