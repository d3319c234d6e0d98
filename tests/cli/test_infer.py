import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.cli.test_main import refused

from mapet.cli import main
from mapet.data.open import open_images


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


def test_predictions_on_standard_output_are_csv_and_nothing_else(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = ["predict", str(classifier), str(digits), "--workers", "0"], str(tmp_path / "p.jsonl")
    assert main([*command, "--top", "2"]) == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader(printed.out.splitlines()))
    assert [row["key"] for row in rows] == list(open_images(str(digits)).keys)
    assert all(float(row["probability"]) >= float(row["probability_2"]) > 0 for row in rows)
    assert printed.err.startswith("60 images in ")
    assert printed.err.rstrip().endswith("images/s): standard output")
    assert main([*command, "--out", out]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.rstrip().endswith(out)
    lines = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    assert f"{out} is there already" in refused(capsys, *command, "--out", out)


def test_a_closed_pipe_ends_the_command_and_names_may_lie_outside_of_the_encoding_of_the_terminal(
    classifier: Path, digits: Path, tmp_path: Path
) -> None:
    photograph = tmp_path / "日本.png"
    photograph.write_bytes((digits / "class 0" / "0.png").read_bytes())
    (tmp_path / "list.txt").write_text(f"{photograph.name}\n" * 3000, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "mapet", "predict", str(classifier), str(tmp_path / "list.txt"), "--batch-size", "50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"key,label,probability\n"
    assert process.stdout.readline().decode().startswith("日本.png,")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + 13


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("embed RUN DIGITS --out features.csv", "'features.csv' does not end in .parquet"),
        ("embed RUN DIGITS --out /proc/f.parquet", "output /proc/f.parquet cannot be written to"),
        ("embed RUN DIGITS --features klass", "features = klass"),
        ("embed RUN DIGITS --image-size 30", "30 is not divisible by its patch size 7; take 28 or 35"),
        ("embed RUN DIGITS --precision fp16", "precision 'fp16' needs a GPU"),
        ("embed RUN", "lacks 'data'"),
        ("embed /no/run DIGITS", "does not exist"),
        ("embed DIGITS RUN", "neither a run"),
        ("embed RUN /no/images", "neither a folder of images, nor an image"),
        ("embed RUN CUT", "cannot be read, the first being 'cut.png'"),
        ("predict MODEL DIGITS --out p.txt", "'p.txt' does not end in .csv or .jsonl or .parquet"),
        ("predict MODEL DIGITS --top 5", "top is 5, but model"),
        ("predict MODEL DIGITS --top 0", "top = 0"),
        ("predict RUN DIGITS", "has no classifier; fine-tune it first with mapet finetune"),
        ("predict MODEL", "lacks 'data'"),
        ("predict MODEL /no/images", "neither a folder of images"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    command: str,
    message: str,
    classifier: Path,
    pretrained_run: Path,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(classifier), "RUN": str(pretrained_run), "DIGITS": str(digits), "CUT": "cut.png"}
    Path("cut.png").write_bytes((digits / "class 0" / "0.png").read_bytes()[:50])
    verb, *given = [names.get(word, word) for word in command.split()]
    assert message in refused(capsys, verb, "--out", "out.parquet", *given)
    assert os.listdir() == ["cut.png"]


def test_classes_may_have_names_that_are_not_unicode(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes are names of folders, which may hold any bytes; config.json keeps them as lone surrogates."""
    shutil.copytree(classifier, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["label_names"] = ["caf\udce9", "b", "c", "d"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    command = ["predict", str(tmp_path / "model"), str(digits / "class 0"), "--workers", "0", "--top", "4"]
    for ending in ("csv", "jsonl", "parquet"):
        assert main([*command, "--out", str(tmp_path / f"x.{ending}")]) == 0
    assert r"caf\udce9" in (tmp_path / "x.csv").read_text()
    labels = pq.read_table(tmp_path / "x.parquet")
    assert any(r"caf\udce9" in labels[f"label{suffix}"].to_pylist() for suffix in ("", "_2", "_3", "_4"))
