import csv
import io
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import mapet
from mapet import MapetError
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.jobs.infer.run import embed_images, predict_images

QUIET = Console(quiet=True)
SMALL: dict[str, Any] = {"workers": 0, "batch_size": 16}


def embed(model: Path, data: Path | str, out: Path, **values: Any) -> Any:
    embed_images({**SMALL, "model": str(model), "data": str(data), **values}, out, console=QUIET)
    return pq.read_table(out)


def array(table: Any, column: str) -> np.ndarray[Any, Any]:
    flat: np.ndarray[Any, Any] = table[column].combine_chunks().flatten().to_numpy()
    return flat.reshape(len(table), -1)


def about(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pq.read_schema(file).metadata[b"mapet"])
    return found


def predict(model: Path, data: Path | str, out: Path, **values: Any) -> list[dict[str, Any]]:
    predict_images({**SMALL, "model": str(model), "data": str(data), **values}, out, console=QUIET)
    if out.suffix == ".parquet":
        return list(pq.read_table(out).to_pylist())
    with out.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if out.suffix == ".csv" else [json.loads(line) for line in file]


def with_timm(exported: Path, data: Path, **arguments: Any) -> tuple[Any, Tensor, tuple[str, ...]]:
    """Return the network of timm, the images as its input, and their keys."""
    network = timm.create_model(f"local-dir:{exported}", pretrained=True, **arguments).eval()
    config = timm.data.resolve_data_config(model=network)
    images = open_images(str(data))
    mean, std = torch.tensor(config["mean"])[:, None, None], torch.tensor(config["std"])[:, None, None]
    return (
        network,
        torch.stack([(images.load(i, Reading(1)) / 255 - mean) / std for i in range(len(images))]),
        images.keys,
    )


@torch.no_grad()
def test_features_are_those_of_timm_in_order(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.parquet"
    kinds = ("patches", "class", "pooled", "mean")
    table = embed(pretrained_run, digits, out, features=kinds)
    network, images, keys = with_timm(pretrained_run / "exported", digits, num_classes=0)
    features = network.forward_features(images)
    patches = features[:, 1:]
    assert table.column_names == ["key", *kinds]
    assert table["key"].to_pylist() == list(keys)
    assert pq.ParquetFile(out).num_row_groups == 4, "one for each batch of 16 images"
    expected = (patches.flatten(1), features[:, 0], network(images), patches.mean(dim=1))
    for kind, values in zip(kinds, expected, strict=True):
        assert array(table, kind).dtype == np.float32
        assert np.allclose(array(table, kind), values, atol=1e-5), kind
    made_by = about(out)
    assert len(made_by.pop("weights_sha256")) == 64
    assert made_by == {
        "version": mapet.__version__,
        "model": str(pretrained_run),
        "image_size": [28, 28],
        "channels": 1,
        "mean": [0.449],
        "std": [0.226],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "squash": False,
        "value_range": None,
        "precision": "no",
        "features": list(kinds),
        "grid": [4, 4],
    }
    assert os.listdir(tmp_path) == ["features.parquet"]


def test_precision_of_the_file_and_of_the_network(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    tables = [
        embed(pretrained_run, digits, tmp_path / f"{number}.parquet", **values)
        for number, values in enumerate(({}, {"dtype": "float16"}, {"precision": "bf16"}))
    ]
    assert all(table.column_names == ["key", "pooled"] for table in tables), "pooled features are the default"
    exact, half, bf16 = (array(table, "pooled") for table in tables)
    assert half.dtype == np.float16
    assert np.array_equal(half, exact.astype(np.float16))
    assert not np.array_equal(exact, bf16)
    assert np.allclose(exact, bf16, atol=0.1)
    assert about(tmp_path / "2.parquet")["precision"] == "bf16"


def test_another_image_size(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.parquet"
    table = embed(pretrained_run, digits, out, features=["patches"], image_size="21x35", crop_pct=0.9)
    assert array(table, "patches").shape == (60, 3 * 5 * 32)
    assert (about(out)["grid"], about(out)["image_size"], about(out)["crop_pct"]) == ([3, 5], [21, 35], 0.9)


def test_damaged_images_are_left_out(
    pretrained_run: Path, classifier: Path, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    damaged = ["class 0/1.png", "class 9/5.png"]
    for key in damaged:
        (folder / key).write_bytes(b"\x89PNG")
    kept = [key for key in open_images(str(digits)).keys if key not in damaged]
    values = {**SMALL, "model": str(pretrained_run), "data": str(folder)}
    result = embed_images(values, tmp_path / "f.parquet", console=QUIET)
    assert (result.images, result.damaged) == (58, 2)
    assert result.describe().startswith("58 images, 2 damaged left out in ")
    assert all(key in caplog.text for key in damaged)
    assert pq.read_table(tmp_path / "f.parquet")["key"].to_pylist() == kept
    assert [row["key"] for row in predict(classifier, folder, tmp_path / "p.csv")] == kept
    with pytest.raises(MapetError, match="images cannot be read, the first being 'class 0/1.png'"):
        embed(pretrained_run, folder, tmp_path / "g.parquet", max_damaged=0.01)
    assert not [name for name in os.listdir(tmp_path) if "g.parquet" in name]


@torch.no_grad()
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_predictions_are_those_of_timm_in_order(kind: str, classifier: Path, digits: Path, tmp_path: Path) -> None:
    rows = predict(classifier, digits, tmp_path / f"p{kind}", top=3)
    network, images, keys = with_timm(classifier, digits)
    probabilities, labels = network(images).softmax(dim=-1).topk(3)
    names = ("round", "straight", "bent", 'odd, "quoted"')
    assert [row["key"] for row in rows] == list(keys)
    assert list(rows[0]) == ["key", "label", "probability", "label_2", "probability_2", "label_3", "probability_3"]
    for rank, suffix in enumerate(("", "_2", "_3")):
        assert [row[f"label{suffix}"] for row in rows] == [names[label] for label in labels[:, rank].tolist()]
        found = [float(row[f"probability{suffix}"]) for row in rows]
        assert np.allclose(found, probabilities[:, rank], atol=1e-5)
    assert len({row["label"] for row in rows}) > 1
    assert list(predict(classifier, digits, tmp_path / f"q{kind}")[0]) == ["key", "label", "probability"]


def test_predictions_of_a_folder_and_of_an_image_into_open_files(
    classifier: Path, digits: Path, tmp_path: Path
) -> None:
    folder, image = io.StringIO(), io.StringIO()
    for data, file in ((digits, folder), (digits / "class 0" / "0.png", image)):
        predict_images({**SMALL, "model": str(classifier), "data": str(data)}, file, console=QUIET)
    predict(classifier, digits, tmp_path / "p.csv")
    assert folder.getvalue() == (tmp_path / "p.csv").read_text()
    assert image.getvalue().splitlines()[1] == folder.getvalue().splitlines()[1].removeprefix("class 0/")


def test_unusual_file_names(pretrained_run: Path, classifier: Path, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"caf\xe9.png", '日本, "x".png'.encode(), b"line\nbreak.png", b"carriage\rreturn.png"):
        shutil.copy(digits / "class 0" / "0.png", folder / os.fsdecode(name))
    keys = sorted(["caf\\udce9.png", '日本, "x".png', "line\nbreak.png", "carriage\\rreturn.png"])
    assert sorted(embed(pretrained_run, folder, tmp_path / "f.parquet")["key"].to_pylist()) == keys
    for kind in (".csv", ".jsonl", ".parquet"):
        assert sorted(row["key"] for row in predict(classifier, folder, tmp_path / f"p{kind}")) == keys


def test_features_that_overflow_are_refused(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    exported = Path(shutil.copytree(pretrained_run / "exported", tmp_path / "model"))
    weights = load_file(exported / "model.safetensors")
    norm = next(name for name in ("fc_norm.weight", "norm.weight") if name in weights)
    weights[norm] *= 1e6
    save_file(weights, exported / "model.safetensors")
    assert np.isfinite(array(embed(exported, digits, tmp_path / "f.parquet"), "pooled")).all()
    with pytest.raises(MapetError, match=r"pooled feature of image 'class 0/0\.png' contains NaN or infinity; pass"):
        embed(exported, digits, tmp_path / "g.parquet", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["f.parquet", "model"]


def test_a_full_disk_is_named(pretrained_run: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(MapetError, match=f"{tmp_path}/f.parquet cannot be written to .* large.*; free some space"):
            embed(pretrained_run, "mnist", tmp_path / "f.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_parquet_without_pyarrow_is_refused_and_csv_is_not(
    classifier: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    predict(classifier, digits, tmp_path / "x.csv")
    with pytest.raises(MapetError, match=r"need pyarrow; install it with: pip install 'mapet\[parquet\]'"):
        predict(classifier, digits, tmp_path / "x.parquet")
