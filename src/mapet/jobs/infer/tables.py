"""Rows written to a file as they come: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from mapet.errors import MapetError

# By name, one entry per row: words or numbers, or (Parquet only) an (n, d) array.
Columns = Mapping[str, Sequence[str] | Sequence[float] | np.ndarray[Any, Any]]


class Rows(Protocol):
    """Takes the same columns each time."""

    def write(self, columns: Columns) -> None:
        """Append a batch of rows."""

    def close(self) -> None:
        """Finish the file."""


class CSVRows:
    """Comma-separated values below a line of the columns' names."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._begun = file, False
        self._writer = csv.writer(file, lineterminator="\n")
        # Python quotes a carriage return only where it is the end of a line; readers take it for one anyway.
        self._quoting = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(self, columns: Columns) -> None:
        """Append a batch of rows."""
        if not self._begun:
            self._writer.writerow(columns)
            self._begun = True
        for row in zip(*columns.values(), strict=True):
            (self._quoting if any("\r" in str(value) for value in row) else self._writer).writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class JSONRows:
    """One JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, columns: Columns) -> None:
        """Append a batch of rows."""
        for row in zip(*columns.values(), strict=True):
            self._file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class ParquetRows:
    """Parquet, a row group a batch; an ``(n, d)`` array becomes a ``fixed_size_list`` of ``d``.

    Args:
        file: to be written.
        about: kept as JSON in the schema's metadata, under ``mapet``.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self._file, self._about = file, about
        self._writer: Any = None

    def write(self, columns: Columns) -> None:
        """Append a batch of rows."""
        arrow, parquet = _import("pyarrow"), _import("pyarrow.parquet")
        arrays = {
            name: arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), values.shape[1])
            if isinstance(values, np.ndarray)
            else arrow.array(values)
            for name, values in columns.items()
        }
        table = arrow.table(arrays, metadata={"mapet": json.dumps(self._about)})
        if self._writer is None:
            # Neither do keys repeat, nor features have a least and greatest that anybody asks for.
            self._writer = parquet.ParquetWriter(
                self._file, table.schema, compression="zstd", use_dictionary=False, write_statistics=["key"]
            )
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


TABLES: dict[str, Callable[[Path, Mapping[str, Any]], Rows]] = {
    ".csv": lambda file, about: CSVRows(file.open("w", encoding="utf-8", newline="")),
    ".jsonl": lambda file, about: JSONRows(file.open("w", encoding="utf-8", newline="")),
    ".parquet": ParquetRows,
}


def check_table(out: str | Path, kinds: Collection[str]) -> str:
    """Return the ending of ``out`` by which ``TABLES`` knows how to write it.

    Raises:
        MapetError: for an ending that is not among ``kinds``, or Parquet without pyarrow.
    """
    kind = Path(out).suffix.lower()
    if kind not in kinds:
        raise MapetError(f"output {str(out)!r} does not end in {' or '.join(kinds)}; choose another --out")
    if kind == ".parquet":
        _import("pyarrow")
    return kind


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MapetError("Parquet files need pyarrow; install it with: pip install 'mapet[parquet]'") from error
