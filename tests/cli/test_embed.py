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
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("60 images in ")
    assert printed.err.rstrip().endswith(f" images/s): {out}")
    assert pq.read_schema(out).names == ["key", "class", "mean"]
    assert f"output {out} is there already" in refused(capsys, *command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "DIGITS", "--out", "features.csv"], "'features.csv' does not end in .parquet"),
        (["RUN", "DIGITS", "--out", "/proc/f.parquet"], "output /proc/f.parquet cannot be written to"),
        (["RUN", "DIGITS", "--features", "klass"], "features = klass"),
        (["RUN", "DIGITS", "--image-size", "30"], "30 is not divisible by its patch size 7; take 28 or 35"),
        (["RUN", "DIGITS", "--precision", "fp16"], "precision 'fp16' needs a GPU"),
        (["RUN"], "lacks 'data'"),
        (["/no/run", "DIGITS"], "does not exist"),
        (["DIGITS", "RUN"], "neither a run"),
        (["RUN", "/no/images"], "neither a folder of images, nor an image"),
        (["RUN", "CUT"], "cannot be read, the first being 'cut.png'"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    arguments: list[str],
    message: str,
    pretrained_run: Path,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"RUN": str(pretrained_run), "DIGITS": str(digits), "CUT": "cut.png"}
    Path("cut.png").write_bytes((digits / "class 0" / "0.png").read_bytes()[:50])
    given = [names.get(argument, argument) for argument in arguments]
    assert message in refused(capsys, "embed", "--out", "f.parquet", *given)
    assert os.listdir() == ["cut.png"]
