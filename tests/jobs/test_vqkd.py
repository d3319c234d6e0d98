import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import QUIET, kill_after, pretrain_tiny, records

from mapet import MapetError, load_tokenizer
from mapet.jobs.tokenizer.train import train_vqkd


@pytest.fixture
def values(digits: Path, exported_vit: Path) -> dict[str, Any]:
    sizes = {"image_size": 28, "patch_size": 7, "channels": 1, "embed_dim": 32, "depth": 1, "num_heads": 2}
    codes = {"vocab_size": 16, "code_dim": 8, "decoder_depth": "1", "crop_min": 0.8, "flip": 0.0}
    training = {"batch_size": 16, "lr": 1e-3, "workers": 0, "data": str(digits), "teacher": str(exported_vit)}
    return {**sizes, **codes, **training}  # decoder_depth as a flag gives it


def test_a_trained_tokenizer_is_used_for_pretraining(values: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    result = train_vqkd({**values, "steps": 60}, tmp_path / "vqkd", console=QUIET)
    assert (result.steps, result.stopped_by, result.exported) == (60, None, tmp_path / "vqkd" / "tokenizer")
    found = records(tmp_path / "vqkd")
    assert {"loss", "cosine", "codes_used"} <= set(found[0])
    assert found[-1]["cosine"] > found[0]["cosine"] + 0.1
    tokenizer = load_tokenizer(tmp_path / "vqkd")
    assert (tokenizer.kind, tokenizer.grid, tokenizer.vocab_size) == ("vqkd", (4, 4), 16)
    grey = torch.rand(2, 1, 28, 28)
    assert torch.equal(tokenizer.encode(grey.expand(-1, 3, -1, -1)), tokenizer.encode(grey))
    run = pretrain_tiny(digits, tmp_path / "run", vocab_size=None, steps=2, tokenizer=str(tmp_path / "vqkd"))
    assert run.task.target.vocab_size == 16


def test_a_killed_training_resumes_exactly(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {"steps": 40, "checkpoint_every": 3}
    train_vqkd(values, tmp_path / "whole", console=QUIET)
    recipe, out = tmp_path / "vqkd.yaml", tmp_path / "killed"
    recipe.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "mapet", "tokenizer", "train", "--config", str(recipe), "--out", str(out)]
    kill_after(9, [*command, "--resume"], out)
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["steps"] == 40
    assert [line["loss"] for line in records(out)] == [line["loss"] for line in records(tmp_path / "whole")]
    one, two = (load_file(run / "tokenizer" / "tokenizer.safetensors") for run in (out, tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decoder_depth": 2}, "decoder_depth = 2"),
        ({"teacher": "tset_resnet"}, "unknown tokenizer or teacher 'tset_resnet'.*'test_resnet'"),
        ({"patch_size": 5}, "not divisible by the patch size 5"),
        ({"num_heads": 5}, "num_heads"),
    ],
)
def test_wrong_input_is_refused(wrong: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=message):
        train_vqkd({**values, "steps": 2, **wrong}, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_other_images_are_refused_when_resuming(values: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_vqkd({**values, "steps": 2}, out, console=QUIET)
    before = (out / "config.yaml").read_text()
    shutil.copytree(digits, tmp_path / "other")
    (tmp_path / "other" / "class 1" / "0.png").unlink()
    with pytest.raises(MapetError, match="'data' changed"):
        train_vqkd({"data": str(tmp_path / "other")}, out, resume=True, console=QUIET)
    assert (out / "config.yaml").read_text() == before
    shutil.rmtree(out / "tokenizer")
    train_vqkd({}, out, resume=True, console=QUIET)
    assert load_tokenizer(out).kind == "vqkd", "the tokenizer of a finished run is written again"
