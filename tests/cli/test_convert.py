import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.cli.test_main import refused

from mapet.cli import main


def test_a_file_becomes_a_folder(
    oracle: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": oracle("finetuned").state_dict, "epoch": 3}, tmp_path / "1e5")
    arguments = ["convert", "upstream", str(tmp_path / "1e5"), "--num-heads", "3", "--mean", "0.5", "0.5", "0.4"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "classifier of 10 classes, 64 px, 3 attention heads: " in said
    assert "entries besides the weights are not used: epoch" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["tag"], config["license"]) == ([0.5, 0.5, 0.4], "upstream", "unknown")
    assert main([*arguments, "--out", str(tmp_path / "again"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["folder"], result["classes"]) == (str(tmp_path / "again"), 10)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--std", "0", "1", "1"], "std = 0: input should be greater than 0"),
        (["--mean", "0.5"], "takes 3 channel(s); pass as many values to --mean and --std"),
        (["--crop-pct", "2"], "crop_pct = 2"),
        (["--num-heads", "many"], "num_heads = many"),
    ],
)
def test_bad_flags_are_refused(
    change: list[str], says: str, oracle: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": oracle("finetuned").state_dict}, tmp_path / "file.tar")
    flags = ["--num-heads", "3", *change, "--out", str(tmp_path / "out")]
    assert says in refused(capsys, "convert", "upstream", str(tmp_path / "file.tar"), *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("mae", "vit_base_patch16_224.mae"),
        ("beit", "beit_base_patch16_224.in22k_ft_in22k_in1k"),
        ("beitv2", "beitv2_base_patch16_224.in1k_ft_in22k_in1k"),
    ],
)
def test_weights_that_timm_ships_are_not_converted(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "convert", kind, "weights.pth", "--out", "folder")
    assert f"mapet convert {kind} is gone; pass timm's name '{name}' as model" in said
    assert timm.is_model(name)
    assert timm.models.get_pretrained_cfg(name) is not None


def test_an_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command 'convert dino'" in refused(capsys, "convert", "dino", "f")
