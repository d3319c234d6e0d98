import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapet.cli import main

QUICK = ["--steps", "2", "--batch-size", "8", "--workers", "0"]


def segment(*arguments: object) -> int:
    return main(["eval", "segment", *map(str, arguments), *QUICK])


def test_json_is_the_only_output_and_equals_the_file(
    exported_vit: Path, mosaics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(exported_vit, mosaics, "--json", "--out", tmp_path / "out", "--head", "conv") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"miou", "pixel_accuracy", "accuracy", "iou_per_class"} <= set(found)
    assert found["head"] == "conv"
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())


def test_table(exported_vit: Path, mosaics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(exported_vit, mosaics) == 0
    shown = capsys.readouterr().out
    assert "mIoU" in shown
    assert "most frequent class everywhere" in shown


def test_recipe_for_ade20k(exported_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("training", 8), ("validation", 1)):
        for kind, values, shape in (("images", 256, (30, 40, 3)), ("annotations", 151, (30, 40))):
            (tmp_path / kind / part).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, values, shape, np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / part / f"ADE_{number}.png")
    recipe = ["--config", "segment_ade20k", "--image-size", "28", "--short-side", "28", "--json"]
    assert segment(exported_vit, tmp_path, *recipe) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["iou_per_class"]) == found["classes"] == 150
    assert found["reduce_zero_label"] is True
    assert (found["steps"], found["lr"]) == (2, 1e-3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--epochs", "1"], "give epochs or steps"),
        (["--mode", "whole", "--short-side", "56"], "short_side is for mode slide"),
        (["--out", "DATA/out"], "lies inside the image folder"),
        (["--out", "FULL"], "is not empty"),
    ],
)
def test_refused_flags(
    flags: list[str], says: str, exported_vit: Path, mosaics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    places = {"DATA/out": mosaics / "out", "FULL": tmp_path}
    assert segment(exported_vit, mosaics, *(places.get(flag, flag) for flag in flags)) == 2
    assert says in capsys.readouterr().err
