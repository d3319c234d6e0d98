from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_main import refused

from mapet.cli import main
from mapet.data.open import open_images


def test_standard_output_is_csv_and_nothing_else(
    classifier: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(classifier), str(digits), "--workers", "0"]
    assert main([*command, "--top", "2"]) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(said.out.splitlines()))
    assert [row["key"] for row in rows] == list(open_images(str(digits)).keys)
    assert all(float(row["probability"]) >= float(row["probability_2"]) > 0 for row in rows)
    assert said.err.startswith("60 images in ")
    assert said.err.rstrip().endswith("images/s): standard output")
    assert main([*command, "--out", str(tmp_path / "p.jsonl")]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.rstrip().endswith(str(tmp_path / "p.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    assert f"{tmp_path / 'p.jsonl'} is there already" in refused(capsys, *command, "--out", str(tmp_path / "p.jsonl"))


def test_a_reader_may_have_enough(classifier: Path, digits: Path, tmp_path: Path) -> None:
    """And names that the terminal's encoding lacks do not matter."""
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
    ("change", "says"),
    [
        (["--out", "p.txt"], "'p.txt' does not end in .csv or .jsonl or .parquet"),
        (["--out", ""], "'' does not end in .csv"),
        (["--out", "/proc/p.csv"], "output /proc/p.csv cannot be written to"),
        (["--top", "5"], "top is 5, but model"),
        (["--top", "0"], "top = 0"),
        (["--image-size", "30"], "30 is not divisible by its patch size 7"),
        (["--precision", "fp16"], "precision 'fp16' needs a GPU"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    change: list[str],
    says: str,
    classifier: Path,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, "predict", str(classifier), str(digits), "--out", "p.csv", *change)
    assert os.listdir(tmp_path) == []


def test_bad_models_and_images(
    pretrained_run: Path, classifier: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "predict", str(pretrained_run), str(digits))
    assert "has no classifier; fine-tune it first with mapet finetune" in said
    assert "lacks 'data'" in refused(capsys, "predict", str(classifier))
    assert "neither a folder of images" in refused(capsys, "predict", str(classifier), "/no/images")
    assert capsys.readouterr().out == ""
