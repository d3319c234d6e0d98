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
from mapet.jobs.infer.tables import TABLES, CSVRows, check_table

BATCHES: list[dict[str, Any]] = [
    {"key": ['a, "b".png', "c\nd.png"], "label": ["é", "0"], "probability": [0.5, 1.0]},
    {"key": ["日本.png"], "label": ["x"], "probability": [0.25]},
]
ROWS = [('a, "b".png', "é", 0.5), ("c\nd.png", "0", 1.0), ("日本.png", "x", 0.25)]


def written(kind: str, folder: Path, batches: list[dict[str, Any]] = BATCHES) -> Path:
    rows = TABLES[kind](folder / f"table{kind}", {"model": "m\udcff"})
    for batch in batches:
        rows.write(batch)
    rows.close()
    return folder / f"table{kind}"


def test_csv(tmp_path: Path) -> None:
    with written(".csv", tmp_path).open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["key", "label", "probability"]
    assert [(key, label, float(probability)) for key, label, probability in rows] == ROWS


def test_json_lines(tmp_path: Path) -> None:
    lines = written(".jsonl", tmp_path).read_text(encoding="utf-8").splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == ROWS
    assert list(json.loads(lines[0])) == ["key", "label", "probability"]


def test_parquet(tmp_path: Path) -> None:
    file = written(".parquet", tmp_path)
    table = pq.read_table(file)
    assert [tuple(row.values()) for row in table.to_pylist()] == ROWS
    assert json.loads(table.schema.metadata[b"mapet"]) == {"model": "m\udcff"}
    assert pq.ParquetFile(file).num_row_groups == 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_keeps_arrays_exactly(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 12)).astype(dtype)
    file = written(".parquet", tmp_path, [{"key": list("abc"), "x": values[:3]}, {"key": list("de"), "x": values[3:]}])
    column = pq.read_table(file)["x"].combine_chunks()
    assert column.type.list_size == 12
    found = column.flatten().to_numpy().reshape(-1, 12)
    assert found.dtype == dtype
    assert np.array_equal(found, values)


def test_endings() -> None:
    assert check_table("a/B.CSV", TABLES) == ".csv"
    for out in ("predictions", "table.txt", "", ".csv"):
        with pytest.raises(MapetError, match=r"does not end in \.csv or \.jsonl or \.parquet; choose another --out"):
            check_table(out, TABLES)
    with pytest.raises(MapetError, match=r"output 'x\.csv' does not end in \.parquet"):
        check_table("x.csv", [".parquet"])


def test_parquet_without_pyarrow_is_refused_and_csv_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    assert check_table("x.csv", TABLES) == ".csv"
    with pytest.raises(MapetError, match=r"need pyarrow; install it with: pip install 'mapet\[parquet\]'"):
        check_table("x.parquet", TABLES)


def test_a_carriage_return_in_a_name_does_not_end_a_row(tmp_path: Path) -> None:
    with (tmp_path / "x.csv").open("w", newline="") as file:
        rows = CSVRows(file)
        rows.write({"key": ["a\rb.png", "c.png"], "label": ["x", "y"]})
        rows.close()
    with (tmp_path / "x.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["key", "label"], ["a\rb.png", "x"], ["c.png", "y"]]
