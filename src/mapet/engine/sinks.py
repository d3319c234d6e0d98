"""Where the loop's records go. A sink knows no metric by name: it writes what it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]


class Sink(Protocol):
    """Receives one record per logged step."""

    def write(self, record: Record) -> None:
        """Take a record; it holds at least ``step``."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """Appends records to a file, one line each, visible at once to whoever follows the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Append one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes numbers as TensorBoard scalars.

    Args:
        folder: of the events.
        first_step: events of this and later steps, left by a killed run, are to be hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, record: Record) -> None:
        """Write each number of the record."""
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
