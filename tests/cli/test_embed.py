from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.cli.test_main import refused

from mapet.cli import main


def test_features_in_a_file(
    pretrained_run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "features.parquet"
    command = ["embed", str(pretrained_run), str(digits), "--out", str(out), "--workers", "0"]
    assert main([*command, "--features", "class", "mean", "--dtype", "float16"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("60 images in ")
    assert said.err.rstrip().endswith(f" images/s): {out}")
    assert pq.read_schema(out).names == ["key", "class", "mean"]
    assert f"output {out} is there already" in refused(capsys, *command)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--out", "features.csv"], "'features.csv' does not end in .parquet"),
        (["--out", ""], "'' does not end in .parquet"),
        (["--out", "/proc/f.parquet"], "output /proc/f.parquet cannot be written to"),
        (["--features", "klass"], "features.0 = 'klass'"),
        (["--features", "class+mean"], "features.0 = 'class+mean'"),
        (["--dtype", "float64"], "dtype = 'float64'"),
        (["--image-size", "30"], "30 is not divisible by its patch size 7; take 28 or 35"),
        (["--image-size", "28x"], "ROWSxCOLUMNS"),
        (["--image-size", "0"], "image_size"),
        (["--crop-pct", "0"], "crop_pct = 0"),
        (["--batch-size", "0"], "batch_size = 0"),
        (["--precision", "fp16"], "precision 'fp16' needs a GPU"),
        (["--precision", "int8"], "precision = 'int8'"),
        (["--max-damaged", "2"], "max_damaged = 2"),
        (["--config", "no-recipe"], "recipe 'no-recipe' is neither a file"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    change: list[str],
    says: str,
    pretrained_run: Path,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, "embed", str(pretrained_run), str(digits), "--out", "f.parquet", *change)
    assert os.listdir(tmp_path) == []


def test_bad_models_and_images(
    pretrained_run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data, out = str(pretrained_run), str(digits), ("--out", str(tmp_path / "f.parquet"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.png").write_bytes((digits / "class 0" / "0.png").read_bytes()[:50])
    assert "lacks 'data'" in refused(capsys, "embed", run, *out)
    assert "does not exist" in refused(capsys, "embed", "/no/run", data, *out)
    (tmp_path / "recipe.yaml").write_text(f"data: {data}\n")
    assert "lacks 'model'" in refused(capsys, "embed", "--config", str(tmp_path / "recipe.yaml"), *out)
    assert "unknown model 'runs'" in refused(capsys, "embed", "runs", data, *out)
    assert "neither a run that was saved" in refused(capsys, "embed", data, run, *out)
    assert "neither a folder of images, nor an image" in refused(capsys, "embed", run, "/no/images", *out)
    assert "holds no image" in refused(capsys, "embed", run, str(tmp_path / "empty"), *out)
    said = refused(capsys, "embed", run, str(tmp_path / "cut.png"), *out)
    assert "cannot be read, the first being 'cut.png'" in said
    assert sorted(os.listdir(tmp_path)) == ["cut.png", "empty", "recipe.yaml"]
