from __future__ import annotations

import csv
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import mapet
from mapet import MapetError
from mapet.data.open import open_images
from mapet.jobs.infer.run import embed_images, predict_images
from mapet.models.export import export_network

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


def by_hand(exported: Path, images: Path, **arguments: Any) -> tuple[Any, Tensor, tuple[str, ...]]:
    """timm's network, all images as it takes them, and their keys."""
    network = timm.create_model(f"local-dir:{exported}", pretrained=True, **arguments).eval()
    config = timm.data.resolve_data_config(model=network)
    listed = open_images(str(images))
    mean, std = torch.tensor(config["mean"])[:, None, None], torch.tensor(config["std"])[:, None, None]
    inputs = [(listed.load(i, 1) / 255 - mean) / std for i in range(len(listed))]
    return network, torch.stack(inputs), listed.keys


@torch.no_grad()
def test_features_are_timms_in_order(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.parquet"
    kinds = ("patches", "class", "pooled", "mean")
    table = embed(pretrained_run, digits, out, features=kinds)
    network, images, keys = by_hand(pretrained_run / "exported", digits, num_classes=0)
    features = network.forward_features(images)
    assert table.column_names == ["key", *kinds]
    assert table["key"].to_pylist() == list(keys)
    expected = {
        "patches": features[:, 1:].flatten(1),
        "class": features[:, 0],
        "pooled": network(images),
        "mean": features[:, 1:].mean(dim=1),
    }
    for kind, values in expected.items():
        found = array(table, kind)
        assert found.dtype == np.float32
        assert np.allclose(found, values, atol=1e-5), kind
    said = about(out)
    assert (said["features"], said["grid"], said["image_size"]) == (list(kinds), [4, 4], [28, 28])
    assert (said["model"], said["version"]) == (str(pretrained_run), mapet.__version__)
    assert (said["mean"], said["std"], said["channels"]) == ([0.449], [0.226], 1)
    assert len(said["weights_sha256"]) == 64
    assert os.listdir(tmp_path) == ["features.parquet"]


def test_pooled_features_are_the_default_and_half_of_them_is_enough(
    pretrained_run: Path, digits: Path, tmp_path: Path
) -> None:
    whole = embed(pretrained_run, digits, tmp_path / "whole.parquet")
    half = embed(pretrained_run, digits, tmp_path / "half.parquet", dtype="float16")
    assert whole.column_names == half.column_names == ["key", "pooled"]
    assert array(half, "pooled").dtype == np.float16
    assert np.array_equal(array(half, "pooled"), array(whole, "pooled").astype(np.float16))


def test_another_size_of_input(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.parquet"
    table = embed(pretrained_run, digits, out, features=["patches"], image_size="21x35", crop_pct=0.9)
    assert array(table, "patches").shape == (60, 3 * 5 * 32)
    assert (about(out)["grid"], about(out)["image_size"], about(out)["crop_pct"]) == ([3, 5], [21, 35], 0.9)


def test_networks_without_a_class_token(digits: Path, tmp_path: Path) -> None:
    values = {"features": ["pooled", "mean", "patches"], "image_size": 32, "reinit": True}
    table = embed(Path("convnext_atto"), digits / "class 3", tmp_path / "f.parquet", **values)
    assert np.allclose(array(table, "mean"), array(table, "patches"), atol=1e-5), "32 pixels are one place"
    with pytest.raises(MapetError, match="class features need a class token, which convnext_atto lacks"):
        embed(Path("convnext_atto"), digits, tmp_path / "g.parquet", **values | {"features": ["class"]})
    assert os.listdir(tmp_path) == ["f.parquet"]


def test_damaged_images_are_left_out(
    pretrained_run: Path, classifier: Path, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoilt = Path(shutil.copytree(digits, tmp_path / "spoilt"))
    damaged = ["class 0/1.png", "class 9/5.png"]
    for key in damaged:
        (spoilt / key).write_bytes(b"\x89PNG")
    kept = [key for key in open_images(str(digits)).keys if key not in damaged]
    with caplog.at_level(logging.WARNING, logger="mapet"):
        result = embed_images(
            {**SMALL, "model": str(pretrained_run), "data": str(spoilt)}, tmp_path / "f.parquet", console=QUIET
        )
    assert (result.images, result.damaged) == (58, 2)
    assert result.describe().startswith("58 images, 2 damaged left out in ")
    assert all(any(key in record.getMessage() for record in caplog.records) for key in damaged)
    assert pq.read_table(tmp_path / "f.parquet")["key"].to_pylist() == kept
    assert [row["key"] for row in predict(classifier, spoilt, tmp_path / "p.csv")] == kept
    with pytest.raises(MapetError, match="images cannot be read, the first being 'class 0/1.png'"):
        embed(pretrained_run, spoilt, tmp_path / "g.parquet", max_damaged=0.01)
    assert not [name for name in os.listdir(tmp_path) if "g.parquet" in name]


@torch.no_grad()
@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_predictions_are_timms_in_order(kind: str, classifier: Path, digits: Path, tmp_path: Path) -> None:
    rows = predict(classifier, digits, tmp_path / f"p{kind}", top=3)
    network, images, keys = by_hand(classifier, digits)
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


def test_predictions_into_an_open_file_and_of_a_single_image(classifier: Path, digits: Path, tmp_path: Path) -> None:
    values = {**SMALL, "model": str(classifier)}
    every = io.StringIO()
    predict_images({**values, "data": str(digits)}, every, console=QUIET)
    predict(classifier, digits, tmp_path / "p.csv")
    assert every.getvalue() == (tmp_path / "p.csv").read_text()
    one = io.StringIO()
    predict_images({**values, "data": str(digits / "class 0" / "0.png")}, one, console=QUIET)
    assert one.getvalue().splitlines()[1] == every.getvalue().splitlines()[1].removeprefix("class 0/")


def test_file_names_that_are_no_unicode(pretrained_run: Path, classifier: Path, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [b"caf\xe9.png", '日本, "x".png'.encode(), b"line\nbreak.png"]
    for name in names:
        shutil.copy(digits / "class 0" / "0.png", folder / os.fsdecode(name))
    keys = sorted(["caf\\udce9.png", '日本, "x".png', "line\nbreak.png"])
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
    with pytest.raises(MapetError, match=r"'pooled' of image 'class 0/0\.png' is not finite; take --precision no"):
        embed(exported, digits, tmp_path / "g.parquet", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["f.parquet", "model"]


def test_half_precision_of_the_network(pretrained_run: Path, digits: Path, tmp_path: Path) -> None:
    exact = array(embed(pretrained_run, digits, tmp_path / "a.parquet"), "pooled")
    half = array(embed(pretrained_run, digits, tmp_path / "b.parquet", precision="bf16"), "pooled")
    assert not np.array_equal(exact, half)
    assert np.allclose(exact, half, atol=0.1)
    assert about(tmp_path / "b.parquet")["precision"] == "bf16"


RUN = """
import sys
from rich.console import Console
from mapet.jobs.infer.run import embed_images
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's peak memory from /proc")
def test_memory_does_not_grow_with_the_images(digits: Path, tmp_path: Path) -> None:
    """205 MB of features are written; a process that kept them would be seen to."""
    small = {"img_size": 28, "patch_size": 2, "in_chans": 1, "embed_dim": 128, "depth": 1, "num_heads": 1}
    network = timm.create_model("vit_tiny_patch16_224", **small, num_classes=0)
    (tmp_path / "model").mkdir()
    export_network(network, tmp_path / "model", (0.5,), (0.25,))
    # Not the demo's images: reading them takes more memory for a moment than keeping features would.
    files = [str(file) for file in sorted(digits.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("\n".join(files * 34))
    code = f"""{RUN}
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

for number, data in enumerate(({str(digits)!r}, {str(tmp_path / "list.txt")!r})):
    values = dict(model={str(tmp_path / "model")!r}, data=data, features=["patches"], workers=0, batch_size=20)
    embed_images(values, f"{tmp_path}/{{number}}.parquet", console=Console(quiet=True))
    print(peak())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    written = pq.ParquetFile(tmp_path / "1.parquet").metadata
    assert (written.num_rows, written.num_row_groups) == (2040, 102)
    assert after - before < 80, "2,040 x 196 x 128 numbers are 205 MB"


def test_a_kill_leaves_nothing_under_the_final_name(pretrained_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.parquet"
    values = {"model": str(pretrained_run), "data": "mnist", "workers": 0, "batch_size": 1}
    process = subprocess.Popen([sys.executable, "-c", f"{RUN}\nembed_images({values}, {str(out)!r})"])
    deadline = time.monotonic() + 120
    while not (tmp_path / ".f.parquet.new").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert len(embed(pretrained_run, "mnist", out, batch_size=500)) == 4000
    assert os.listdir(tmp_path) == ["f.parquet"]


def test_a_full_disk_is_one_sentence(pretrained_run: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(MapetError, match=f"cannot write to {tmp_path}: a file grew over the size limit"):
            embed(pretrained_run, "mnist", tmp_path / "f.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_grey_pictures_of_colour_models(digits: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (40, 30), (255, 0, 0, 128)).save(tmp_path / "red.png")
    values = {"model": "resnet18", "reinit": True, "image_size": 32, "data": str(tmp_path), "workers": 0}
    result = embed_images(values, tmp_path / "f.parquet", console=QUIET)
    assert result.images == 1
