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
from mapet.jobs.segment.run import segment

BRIEF: dict[str, Any] = {"steps": 3, "epochs": None}


def measure(model: Path | str, data: Path, out: Path | None = None, **changes: Any) -> dict[str, Any]:
    values = {"image_size": 56, "batch_size": 8, "flip": 0.0, "crop_min": 0.9, "lr": 1e-2, "epochs": 8}
    values |= {"model": str(model), "data": str(data), "workers": 0, **changes}
    return segment(values, out, console=Console(quiet=True))


@pytest.fixture
def data(mosaics: Path, tmp_path: Path) -> Path:
    """A copy of the mosaics, to be changed."""
    return Path(shutil.copytree(mosaics, tmp_path / "data"))


def paint(folder: Path, value: int) -> None:
    """Set all pixels of the masks in a folder to one value."""
    for path in folder.iterdir():
        Image.fromarray(np.full((56, 56), value, np.uint8)).save(path)


@pytest.mark.parametrize(("head", "image_size", "epochs"), [("linear", 112, 16), ("conv", 56, 8)])
def test_heads_beat_the_most_frequent_class(
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


def test_files_and_the_spread_over_seeds(exported_vit: Path, mosaics: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    found = measure(exported_vit, mosaics, out, seeds=2, **BRIEF)
    names = {"results.json", "results.md", "head.safetensors", "predictions.png"}
    assert {path.name for path in out.iterdir()} == names
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
    assert measure(exported_vit, mosaics, **BRIEF)["miou"] == values[0], "the same seed gives the same result"


def test_random_weights_differ_by_seed(exported_vit: Path, mosaics: Path) -> None:
    variants: tuple[dict[str, Any], ...] = ({}, {"reinit": True}, {"reinit": True, "seed": 1})
    assert len({measure(exported_vit, mosaics, **variant, **BRIEF)["miou"] for variant in variants}) == 3


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_images_of_different_sizes(mode: str, exported_vit: Path, data: Path) -> None:
    for path in data.rglob("*.png"):
        with Image.open(path) as image:
            resized = image.resize((56, 56 + int(path.stem)), Image.Resampling.NEAREST)
        resized.save(path)
    found = measure(exported_vit, data, head="conv", mode=mode)
    assert found["miou"] > found["majority_miou"] + 0.1
    assert found["image_size"] == [56, 56]


def test_convnets_are_measured(mosaics: Path) -> None:
    assert 0 < measure("test_convnext", mosaics, reinit=True, image_size=64, **BRIEF)["miou"] < 1


def test_damaged_images_are_left_out_up_to_a_share(exported_vit: Path, data: Path) -> None:
    (data / "images" / "val" / "50.png").write_bytes(b"no picture")
    with pytest.raises(MapetError, match=r"1 of 12 images cannot be read, the first being '50\.png'"):
        measure(exported_vit, data, **BRIEF, max_damaged=0.05)
    assert measure(exported_vit, data, **BRIEF)["test_images"] == 11
    for path in (data / "images" / "val").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(MapetError, match="no test image of .* can be read"):
        measure(exported_vit, data, **BRIEF, max_damaged=1.0)


@pytest.mark.parametrize(
    ("changes", "masks", "says"),
    [
        ({"classes": 3}, {}, "have the class 3, but --classes is 3"),
        ({"batch_size": 49}, {}, "batch size 49 is larger than the training part of 48 images"),
        ({"image_size": 30}, {}, "30 is not divisible by its patch size 7"),
        ({}, {"val": 9}, "the test masks of .* have the class 9, which no training mask has"),
        ({}, {"val": 255}, "no test image of .* has pixels of a class"),
        ({}, {"train": 0}, "hold 1 class .*--ignore-index is 255.*masks of 0 and 255 must be saved as 0 and 1"),
        ({}, {"train": 255}, "the training masks of .* hold 0 class"),
        ({"model": "pit_ti_224", "image_size": 224}, {}, "patches features need a grid of patches"),
    ],
)
def test_refused_data_and_models(
    changes: dict[str, Any], masks: dict[str, int], says: str, exported_vit: Path, data: Path, tmp_path: Path
) -> None:
    for part, value in masks.items():
        paint(data / "masks" / part, value)
    options = {**BRIEF, "reinit": "model" in changes, **changes}
    with pytest.raises(MapetError, match=says):
        measure(options.pop("model", exported_vit), data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_classes_without_training_masks_are_accepted_with_a_number_of_classes(exported_vit: Path, data: Path) -> None:
    paint(data / "masks" / "val", 9)
    assert measure(exported_vit, data, **BRIEF, classes=12)["iou_per_class"][9] is not None
