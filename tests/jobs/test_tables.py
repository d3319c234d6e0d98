from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mapet import MapetError
from mapet.jobs.infer.tables import new_table

BATCHES: list[dict[str, Any]] = [
    {"key": ['a, "b".png', "c\nd.png"], "label": ["é", "0"], "probability": [0.5, 1.0]},
    {"key": ["日本.png"], "label": ["x"], "probability": [0.25]},
]
ROWS = [('a, "b".png', "é", 0.5), ("c\nd.png", "0", 1.0), ("日本.png", "x", 0.25)]


def written(file: Path, batches: list[dict[str, Any]] = BATCHES) -> Path:
    with new_table(file) as write:
        write(batches, {"model": "m\udcff"})
    return file


def test_csv(tmp_path: Path) -> None:
    with written(tmp_path / "x.CSV").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["key", "label", "probability"]
    assert [(key, label, float(probability)) for key, label, probability in rows] == ROWS


def test_json_lines(tmp_path: Path) -> None:
    lines = written(tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == ROWS
    assert list(json.loads(lines[0])) == ["key", "label", "probability"]


def test_parquet(tmp_path: Path) -> None:
    file = written(tmp_path / "x.parquet")
    table = pq.read_table(file)
    assert [tuple(row.values()) for row in table.to_pylist()] == ROWS
    assert json.loads(table.schema.metadata[b"mapet"]) == {"model": "m\udcff"}
    assert pq.ParquetFile(file).num_row_groups == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_keeps_arrays_exactly(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 12)).astype(dtype)
    batches = [{"key": list("abc"), "x": values[:3]}, {"key": list("de"), "x": values[3:]}]
    column = pq.read_table(written(tmp_path / "x.parquet", batches))["x"].combine_chunks()
    found = column.flatten().to_numpy().reshape(-1, column.type.list_size)
    assert found.dtype == dtype
    assert np.array_equal(found, values)


def test_parquet_without_pyarrow_is_refused_and_csv_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    written(tmp_path / "x.csv")
    with pytest.raises(MapetError, match=r"need pyarrow; install it with: pip install 'mapet\[parquet\]'"):
        written(tmp_path / "x.parquet")
