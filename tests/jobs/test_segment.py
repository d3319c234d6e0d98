from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from mapet import MapetError
from mapet.jobs.segment.run import evaluate_segmentation

QUIET = Console(file=io.StringIO())


def measure(model: Path, data: Path, out: Path | None = None, **changes: Any) -> dict[str, Any]:
    values = {
        "model": str(model),
        "data": str(data),
        "image_size": 56,
        "workers": 0,
        "batch_size": 8,
        "flip": 0.0,
        "crop_min": 0.9,
        "lr": 1e-2,
        "epochs": 8,
    }
    return evaluate_segmentation({**values, **changes}, out, console=QUIET)


@pytest.mark.parametrize(("head", "image_size", "epochs"), [("linear", 112, 16), ("conv", 56, 8)])
def test_heads_find_ink_and_tell_digits_apart(
    head: str, image_size: int, epochs: int, exported_vit: Path, mosaics: Path
) -> None:
    found = measure(exported_vit, mosaics, head=head, image_size=image_size, epochs=epochs)
    assert found["classes"] == 4
    assert (found["train_images"], found["test_images"], found["steps"]) == (48, 12, 6 * epochs)
    assert found["majority_miou"] == pytest.approx(found["majority_accuracy"] / 4)
    assert found["pixel_accuracy"] == found["accuracy"] > found["majority_accuracy"] + 0.02
    assert found["miou"] > found["majority_miou"] + 0.1
    assert found["miou"] == pytest.approx(np.mean(found["iou_per_class"]))
    assert found["miou_std"] is None


def test_results_are_written_whole_with_the_spread_over_seeds(
    exported_vit: Path, mosaics: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    found = measure(exported_vit, mosaics, out, seeds=2, steps=3, epochs=None)
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        "results.md",
        "head.safetensors",
        "predictions.png",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert json.loads((out / "results.json").read_text()) == found
    values = [run["miou"] for run in found["runs"]]
    assert values[0] != values[1]
    assert found["miou"] == pytest.approx(np.mean(values))
    assert found["miou_std"] == pytest.approx(np.std(values, ddof=1))
    assert "mean of 2 heads" in (out / "results.md").read_text()
    with safe_open(out / "head.safetensors", "pt") as file:
        assert file.get_tensor("1.weight").shape == (4, 32, 1, 1)
        assert file.metadata()["head"] == "linear"
    with Image.open(out / "predictions.png") as picture:
        assert picture.width > picture.height > 300
    assert measure(exported_vit, mosaics, steps=3, epochs=None)["miou"] == values[0], "the same seed, the same figure"


def test_random_weights_differ_by_seed(exported_vit: Path, mosaics: Path) -> None:
    own, random, other = (
        measure(exported_vit, mosaics, steps=3, epochs=None, **changes)
        for changes in ({}, {"reinit": True}, {"reinit": True, "seed": 1})
    )
    assert len({own["miou"], random["miou"], other["miou"]}) == 3


def test_images_of_any_size_and_shape_in_windows_or_whole(exported_vit: Path, mosaics: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for source in (mosaics / "images" / part).iterdir():
            for kind in ("images", "masks"):
                with Image.open(mosaics / kind / part / source.name) as image:
                    size = (56, 56 + int(source.stem))
                    target = tmp_path / kind / part / source.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    image.resize(size, Image.Resampling.NEAREST).save(target)
    for mode in ("slide", "whole"):
        found = measure(exported_vit, tmp_path, head="conv", mode=mode)
        assert found["miou"] > found["majority_miou"] + 0.1
        assert found["image_size"] == [56, 56]


def test_convnets_are_measured_too(mosaics: Path) -> None:
    found = measure(Path("test_convnext"), mosaics, reinit=True, image_size=64, steps=4, epochs=None)
    assert 0 < found["miou"] < 1


def test_damaged_images_are_left_out_up_to_a_share(exported_vit: Path, mosaics: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(mosaics, root)
    (root / "images" / "val" / "50.png").write_bytes(b"no picture")
    with pytest.raises(MapetError, match=r"1 of 12 images cannot be read, the first being '50\.png'"):
        measure(exported_vit, root, steps=1, epochs=None, max_damaged=0.05)
    assert 0 <= measure(exported_vit, root, steps=1, epochs=None)["miou"] <= 1
    for path in (root / "images" / "val").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(MapetError, match="cannot be read"):
        measure(exported_vit, root, steps=1, epochs=None, max_damaged=1.0)


def paint(root: Path, part: str, value: int | None) -> None:
    """Give every labelled pixel of a part one value."""
    for path in (root / "masks" / part).iterdir():
        Image.fromarray(np.full((56, 56), value, np.uint8)).save(path)


def test_what_masks_say_must_make_sense(exported_vit: Path, mosaics: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(mosaics, root)

    def refused(**changes: Any) -> str:
        with pytest.raises(MapetError) as caught:
            measure(exported_vit, root, out, steps=1, epochs=None, **changes)
        assert not out.exists()
        return str(caught.value)

    assert "have the class 3, but --classes is 3" in refused(classes=3)
    assert "batch size 49 is larger than the training part of 48 images" in refused(batch_size=49)
    assert "30 is not divisible by its patch size 7" in refused(image_size=30)
    paint(root, "val", 9)
    assert "the test masks" in (said := refused())
    assert "have the class 9, which no training mask has" in said
    assert measure(exported_vit, root, steps=1, epochs=None, classes=12)["iou_per_class"][9] is not None
    paint(root, "val", 255)
    assert "the test masks" in (said := refused())
    assert "hold no class at all" in said
    paint(root, "train", 0)
    assert "hold the single class 0 (--ignore-index is 255); at least 2" in (said := refused())
    assert "masks of 0 and 255 must be saved as 0 and 1" in said
    paint(root, "train", 255)
    assert "hold no class at all" in refused()


def test_masks_of_0_and_255_without_a_value_of_no_class_are_warned_of(
    exported_vit: Path, mosaics: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"
    shutil.copytree(mosaics, root)
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    for classes in (None, 256):
        caplog.clear()
        measure(exported_vit, root, steps=1, epochs=None, ignore_index=None, classes=classes)
        assert ("of the 256 classes 0 to 255" in caplog.text and "only 2 occur" in caplog.text) == (classes is None)


def test_models_without_enough_patches(mosaics: Path) -> None:
    for model, size, batch, says in (
        ("pit_ti_224", 224, 8, "patches features need a grid of patches, which pit_ti_224 lacks"),
        ("resnet10t", 32, 1, "makes a single patch of an image"),
    ):
        with pytest.raises(MapetError, match=says):
            measure(Path(model), mosaics, reinit=True, image_size=size, batch_size=batch)
