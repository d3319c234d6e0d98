from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.conftest import TINY

from mapet import MapetError, load_tokenizer
from mapet.cli import main
from mapet.tokenizers import KFeatures, KPixels
from mapet.workflows import bootstrap

QUIET = Console(quiet=True)


def test_each_round_predicts_what_the_last_one_learned(digits: Path, tmp_path: Path) -> None:
    values = {**TINY, "data": str(digits), "steps": 10}
    first, second, third = bootstrap(values, tmp_path / "boot", rounds=2, block=0, console=QUIET)
    kinds = [type(load_tokenizer(result.folder.tokenizer)) for result in (first, second, third)]
    assert kinds == [KPixels, KFeatures, KFeatures]
    images = torch.rand(2, 1, 28, 28)
    for teacher, student in ((first, second), (second, third)):
        tokenizer = load_tokenizer(student.folder.tokenizer)
        backbone = teacher.objective.backbone.eval()
        normalised = (images - torch.tensor(teacher.config.input_mean)) / torch.tensor(teacher.config.input_std)
        expected = backbone.forward_intermediates(normalised, indices=[0], intermediates_only=True)[0]
        assert torch.allclose(tokenizer.features(images), expected.flatten(2).mT, atol=1e-5)
    # Done rounds are passed over, one that is not is continued, and the teacher is in the tokenizer.
    shutil.rmtree(third.folder.root)
    again = bootstrap(values, tmp_path / "boot", rounds=2, block=0, resume=True, console=QUIET)
    same = [result.objective.state_dict() for result in (third, again[-1])]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_the_command(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "vit_tiny_patch16_224", "--image-size", "28", "--patch-size", "7", "--channels", "1",
             "--model-args", "embed_dim=32", "depth=2", "num_heads=2", "--vocab-size", "16", "--batch-size", "8",
             "--steps", "2", "--workers", "0"]  # fmt: skip
    assert main(["bootstrap", str(digits), "--out", str(tmp_path / "boot"), "--json", *flags]) == 0
    rounds = json.loads(capsys.readouterr().out)["rounds"]
    assert [Path(each["folder"]).name for each in rounds] == ["round0", "round1"]
    assert [each["tokenizer"] for each in rounds] == ["pixels", str(tmp_path / "boot" / "round0" / "exported")]


def test_bad_input(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="rounds is 0"):
        bootstrap({**TINY, "data": str(digits)}, tmp_path / "boot", rounds=0)
    with pytest.raises(MapetError, match="leave --tokens out"):
        bootstrap({**TINY, "data": str(digits), "tokens": "x"}, tmp_path / "boot")
    with pytest.raises(MapetError, match="no stage 7"):
        bootstrap({**TINY, "data": str(digits), "steps": 2}, tmp_path / "boot", block=7, console=QUIET)
