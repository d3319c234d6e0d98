from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch

from mapet.cli import main
from mapet.jobs.convert import run as converting
from mapet.jobs.convert import verb as convert
from mapet.jobs.convert.config import ConvertConfig


def test_a_file_becomes_a_folder(
    oracle: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": oracle("finetuned").state_dict, "epoch": 3}, tmp_path / "1e5")
    arguments = ["convert", "upstream", str(tmp_path / "1e5"), "--num-heads", "3", "--mean", "0.5", "0.5", "0.4"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "classifier of 10 classes, 64 px, 3 attention heads: " in said
    assert "besides the weights, not used: epoch" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["tag"], config["license"]) == ([0.5, 0.5, 0.4], "upstream", "unknown")
    assert main([*arguments, "--out", str(tmp_path / "again"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["folder"], result["classes"], result["others"]) == (str(tmp_path / "again"), 10, ["epoch"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--std", "0", "1", "1"], "std must be positive"),
        (["--mean", "0.5"], "3 channel(s), but mean has 1 values; pass --mean"),
        (["--crop-pct", "2"], "crop_pct = 2"),
        (["--num-heads", "many"], "num_heads = 'many'"),
        (["--model", "vit_tiny_patch16_225"], "unknown model 'vit_tiny_patch16_225'; did you mean"),
    ],
)
def test_bad_flags(
    change: list[str], says: str, oracle: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": oracle("finetuned").state_dict}, tmp_path / "file.tar")
    flags = ["--num-heads", "3", *change, "--out", str(tmp_path / "out")]
    assert main(["convert", "upstream", str(tmp_path / "file.tar"), *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_kind_is_offered() -> None:
    kinds = set(get_args(ConvertConfig.model_fields["kind"].annotation))
    assert convert.KINDS.keys() == converting.KINDS.keys() == kinds


def test_assumed_heads_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=1, num_heads=1)
    torch.save(network.state_dict(), tmp_path / "mae.pth")
    assert main(["convert", "mae", str(tmp_path / "mae.pth"), "--out", str(tmp_path / "out")]) == 0
    assert "1 attention heads (assumed: the file does not tell; else say --num-heads): " in capsys.readouterr().err
