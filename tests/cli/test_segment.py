from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapet.cli import main

QUICK = ["--steps", "2", "--batch-size", "8", "--workers", "0"]


def segment(*arguments: object) -> int:
    return main(["eval", "segment", *map(str, arguments), *QUICK])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert segment(*arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mapet: error: ")]
    assert len(said) == 1
    return said[0]


def test_one_json_object_on_standard_output(
    exported_vit: Path, mosaics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(exported_vit, mosaics, "--json", "--out", tmp_path / "out", "--head", "conv") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"miou", "pixel_accuracy", "accuracy", "iou_per_class"} <= set(found)
    assert found["head"] == "conv"
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_table_for_people(exported_vit: Path, mosaics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(exported_vit, mosaics) == 0
    shown = capsys.readouterr().out
    assert "mIoU" in shown
    assert "most frequent class everywhere" in shown


def test_the_recipe_is_ade20ks(exported_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("training", 8), ("validation", 1)):
        for number in range(count):
            for kind, pixels in (
                ("images", generator.integers(0, 256, (30, 40, 3), np.uint8)),
                ("annotations", generator.integers(0, 151, (30, 40), np.uint8)),
            ):
                target = tmp_path / kind / part / f"ADE_{number}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(target)
    recipe = ["--config", "segment_ade20k", "--image-size", "28", "--short-side", "28", "--json"]
    assert segment(exported_vit, tmp_path, *recipe) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["iou_per_class"]) == found["classes"] == 150
    assert found["reduce_zero_label"] is True
    assert (found["steps"], found["lr"]) == (2, 1e-3)


def test_bad_input_is_one_sentence_and_nothing_is_written(
    exported_vit: Path, mosaics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    to = ["--out", out]
    assert "unknown model 'vit_tny'" in refused(capsys, "vit_tny", mosaics, *to)
    assert "is no folder of images with masks" in refused(capsys, exported_vit, tmp_path / "none", *to)
    assert "lacks 'data'" in refused(capsys, exported_vit, *to)
    assert "head = 'unet'" in refused(capsys, exported_vit, mosaics, *to, "--head", "unet")
    assert "give epochs or steps" in refused(capsys, exported_vit, mosaics, *to, "--epochs", "1")
    whole = ["--mode", "whole", "--short-side", "56"]
    assert "short_side is for mode slide" in refused(capsys, exported_vit, mosaics, *to, *whole)
    assert not out.exists()
    assert "lies inside the image folder" in refused(capsys, exported_vit, mosaics, "--out", mosaics / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    assert "is there already and is not empty" in refused(capsys, exported_vit, mosaics, "--out", tmp_path / "full")


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, mapet.cli; mapet.cli.main(['eval', 'segment', '--help'])"
    shown = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert "--reduce-zero-label" in shown.stdout
    assert all(line.split("|")[-1].strip() != "torch" for line in shown.stderr.splitlines())
