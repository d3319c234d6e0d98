from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mapet.cli import main
from mapet.cli.flags import given_values
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.pretrain.config import PretrainConfig


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mapet: error: ")
    return said


def test_bad_input_is_one_sentence_and_leaves_nothing(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "out"))
    small = ("--config", "demo")
    assert "neither a folder" in refused(capsys, str(tmp_path / "none"), *small, *out)
    assert "did you mean 'mim'" in refused(capsys, str(digits), *small, "--objectives", "mimm", *out)
    assert "'hours=3' names no budget" in refused(capsys, str(digits), *small, "--budget", "hours=3", *out)
    assert "'epochs=0.5' has no amount" in refused(capsys, str(digits), *small, "--budget", "epochs=0.5", *out)
    assert "'mim' is named twice" in refused(capsys, str(digits), *small, "--objectives", "mim,mim", *out)
    assert "the unknown key" in refused(capsys, str(digits), *small, "--knn", "neighbours=3", *out)
    assert "--arms takes KEY=VALUE" in refused(capsys, str(digits), *small, "--arms", "half", *out)
    assert "a codebook of 4096 ids needs" in refused(
        capsys, str(digits), *small, "--objectives", "mim", "--vocab-size", "4096", "--batch-size", "8", *out
    )
    assert "holds no comparison to join; begin it first" in refused(capsys, "--join", *out)
    assert "not allowed with argument --resume" in refused(capsys, "--resume", "--join", *out)
    assert not (tmp_path / "out").exists()


def test_flags_of_both_configurations_are_read() -> None:
    import argparse

    from mapet.jobs.compare import verb as compare

    parser = argparse.ArgumentParser()
    compare.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(
        [
            "compare",
            "data",
            "--out",
            "o",
            "--config",
            "demo",
            "--objectives",
            "mapet,mim",
            "random",
            "--epochs",
            "2",
            "--finetune",
            "labels_per_class=10",
            "lr=1e-3",
            "--arms",
            "half={objective: mapet, context_tokens: 9}",
        ]
    )
    values = given_values(parsed, CompareConfig, PretrainConfig)
    assert values["objectives"] == ["mapet", "mim", "random"]
    assert values["epochs"] == 2
    assert "steps" not in values
    assert values["finetune"] == {"labels_per_class": 10, "lr": 1e-3}
    assert values["arms"] == {"half": {"objective": "mapet", "context_tokens": 9}}
    assert values["image_size"] == 28


def test_help_needs_no_torch() -> None:
    code = "import sys\nfrom mapet.cli import main\ntry: main(['compare', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
