"""Tables that are written batch by batch: CSV, JSON lines, Parquet."""

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mapet.engine.files import new_file
from mapet.errors import MapetError

# The rows of a batch, by column: text or numbers, or in Parquet files also an ``(n, d)`` array.
Columns = Mapping[str, Any]
# Writes all batches to a table; the second argument describes how they were made.
WriteTable = Callable[[Iterable[Columns], Mapping[str, Any]], None]
ENDINGS = (".csv", ".jsonl", ".parquet")


@contextmanager
def new_table(out: str | Path | TextIO, endings: Collection[str] = ENDINGS) -> Iterator[WriteTable]:
    """Give a function that writes a new table: to a file, by its ending, or as CSV to an open text file.

    Raises:
        MapetError: for another ending, a file that exists or cannot be written, or Parquet without pyarrow.
    """
    if not isinstance(out, str | Path):
        yield lambda batches, about: write_csv(out, batches)
        return
    ending = Path(out).suffix.lower()
    if ending not in endings:
        raise MapetError(f"output {str(out)!r} does not end in {' or '.join(endings)}; choose another --out")
    if ending == ".parquet" and find_spec("pyarrow") is None:
        raise MapetError("Parquet files need pyarrow; install it with: pip install 'mapet[parquet]'")
    with new_file(Path(out)) as fresh:
        if ending == ".parquet":
            yield partial(write_parquet, fresh)
        else:
            with fresh.open("w", encoding="utf-8", newline="") as file:
                write = write_csv if ending == ".csv" else write_json_lines
                yield lambda batches, about: write(file, batches)


def write_csv(file: TextIO, batches: Iterable[Columns]) -> None:
    """Write a header and comma-separated values."""
    writer = csv.writer(file, lineterminator="\n")
    for number, columns in enumerate(batches):
        if number == 0:
            writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        file.flush()


def write_json_lines(file: TextIO, batches: Iterable[Columns]) -> None:
    """Write one JSON object per line."""
    for columns in batches:
        for row in zip(*columns.values(), strict=True):
            file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")


def write_parquet(file: Path, batches: Iterable[Columns], about: Mapping[str, Any]) -> None:
    """Write one row group per batch; an ``(n, d)`` array becomes a ``fixed_size_list`` of ``d``.

    Args:
        file: to write.
        batches: columns by name, the same for each batch.
        about: stored as JSON in the metadata of the schema, under ``mapet``.
    """
    import pyarrow
    from pyarrow import parquet

    def to_arrow(columns: Columns) -> Any:
        arrays = {
            name: pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])
            if isinstance(values, np.ndarray)
            else pyarrow.array(values)
            for name, values in columns.items()
        }
        return pyarrow.table(arrays, metadata={"mapet": json.dumps(about)})

    tables = map(to_arrow, batches)
    first = next(tables)
    # Keys do not repeat, so a dictionary is useless, and so are the statistics of features.
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": ["key"]}
    with parquet.ParquetWriter(file, first.schema, **options) as writer:
        for table in chain([first], tables):
            writer.write_table(table)
