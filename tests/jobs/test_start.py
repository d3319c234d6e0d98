"""Continued pre-training: what a run takes over from its source, and which sources and values are refused."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save
from tests.conftest import (
    QUIET,
    TINY,
    assert_same_run,
    checkpoint,
    checkpoint_state,
    kill_after,
    mapet_command,
    pretrain_tiny,
    resume_pretraining,
)
from timm.models.vision_transformer import VisionTransformer

from mapet import MapetError
from mapet.jobs.demo.run import run_demo
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.pretrain.run import pretrain
from mapet.jobs.pretrain.settle import initial_backbone, settle_run
from mapet.jobs.pretrain.start import load_weights, read_weights
from mapet.models.export import export_network

# What a continued run needs besides its source.
MORE = {"batch_size": 8, "lr": 1e-3, "workers": 0}
# One step that changes no weight by more than 1e-9.
STILL = {"steps": 1, "lr": 1e-12, "warmup": 0.0, "min_lr": 0.0}


def continue_run(data: Path, out: Path, init: Path | str, **values: Any) -> Any:
    return pretrain({**MORE, "data": str(data), "init": str(init), **values}, out, console=QUIET)


def begin(init: Path | str, **values: Any) -> tuple[PretrainConfig, VisionTransformer]:
    """The configuration and the backbone that a run begins with."""
    config = settle_run({**MORE, "data": "digits", "vocab_size": 16, "init": str(init), **values}, images=60)
    backbone = initial_backbone(config)
    load_weights(backbone, read_weights(config), config)
    return config, backbone.eval()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-9, rtol=0)


@pytest.fixture(scope="module")
def source(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source") / "run"
    pretrain_tiny(digits, out, steps=3, objective="pim", mean=[0.3], std=[0.4])
    return out


@pytest.fixture
def copied_source(source: Path, tmp_path: Path) -> Path:
    """A source that a test may damage or remove."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def test_backbone_is_taken_over(source: Path, digits: Path, tmp_path: Path) -> None:
    config = continue_run(digits, tmp_path / "run", source, vocab_size=16, **STILL).config
    assert (config.model, config.patch_size, config.channels) == ("vit_tiny_patch16_224", 7, 1)
    assert (config.image_size, config.layer_scale, config.mean, config.std) == (28, 0.1, (0.3,), (0.4,))
    assert (config.model_args, config.objective) == (TINY["model_args"], "mapet")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["init"] == str(source)
    origin = json.loads((tmp_path / "run" / "origin.json").read_text())
    assert (origin["run"], origin["config"]["objective"], origin["images"]) == ("run", "pim", 60)
    before, after = checkpoint(source), checkpoint(tmp_path / "run")
    assert all(close(after[name], tensor) for name, tensor in before.items() if name.startswith("backbone."))
    assert not any(close(after[name], before[name]) for name in ("mask_token", "head.weight"))


def test_killed_run_resumes_exactly_without_its_source(copied_source: Path, digits: Path, tmp_path: Path) -> None:
    """The run is killed before its first ordinary checkpoint, then its source is removed."""
    values = {**MORE, "data": str(digits), "init": str(copied_source), "vocab_size": 16}
    values |= {"steps": 60, "checkpoint_every": 50}
    pretrain(values, tmp_path / "whole", console=QUIET)
    out = tmp_path / "killed"
    kill_after(4, mapet_command("pretrain", values, out), out)
    assert checkpoint_state(out)["step"] == 0
    shutil.rmtree(copied_source)
    with pytest.raises(MapetError, match=r"'init' is 'elsewhere', but the run in .* began with"):
        resume_pretraining(out, init="elsewhere")
    resume_pretraining(out, init=str(copied_source))
    assert_same_run(out, tmp_path / "whole")


def test_image_size_and_channels_may_differ(source: Path) -> None:
    config, backbone = begin(source, image_size=42, channels=3)
    assert config.mean == (0.485, 0.456, 0.406)
    assert backbone.pos_embed.shape == (1, 37, 32)
    expected = timm.create_model(f"local-dir:{source / 'exported'}", pretrained=True, img_size=42, in_chans=3).eval()
    images = torch.randn(2, 3, 42, 42)
    assert torch.allclose(backbone(images), expected(images), atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"reg_tokens": 2}, {"class_token": False}, {"reg_tokens": 1, "no_embed_class": True}]
)
def test_register_tokens_and_no_class_token(
    changes: dict[str, Any], tiny_vit: Callable[..., Any], tmp_path: Path
) -> None:
    vit = tiny_vit(channels=1, **changes).eval()
    export_network(vit, tmp_path, (0.5,), (0.5,))
    config, backbone = begin(tmp_path)
    assert (config.mean, config.layer_scale) == ((0.5,), None)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(backbone(images), vit(images))
    _, larger = begin(tmp_path, image_size=42)
    vit.set_input_size(img_size=(42, 42))
    images = torch.randn(2, 1, 42, 42)
    assert torch.allclose(larger(images), vit(images), atol=1e-6)


def test_norm_of_a_classifier_is_not_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A classifier that pools before its norm has no norm of tokens."""
    caplog.set_level(logging.INFO)
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5, global_pool="avg", fc_norm=True
    )
    torch.nn.init.normal_(vit.fc_norm.weight)
    export_network(vit, tmp_path, (0.5,) * 3, (0.5,) * 3)
    config, backbone = begin(tmp_path)
    assert (config.model, config.channels, config.image_size) == ("vit_tiny_patch16_224", 3, 32)
    assert (config.model_args, config.layer_scale) == ({"depth": 1}, None)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    assert torch.equal(backbone.norm.weight, torch.ones(192))
    assert "not taken over: fc_norm.weight, fc_norm.bias; drawn anew: norm.weight, norm.bias" in caplog.text


def test_oblong_source_needs_an_image_size(tiny_vit: Callable[..., Any], tmp_path: Path) -> None:
    vit = tiny_vit(channels=1)
    vit.set_input_size(img_size=(28, 56))
    export_network(vit, tmp_path, (0.5,), (0.5,))
    with pytest.raises(MapetError, match=r"takes images of 28 x 56 pixels, and pre-training takes squares"):
        begin(tmp_path)
    vit.set_input_size(img_size=(28, 28))
    assert torch.allclose(begin(tmp_path, image_size=28)[1].pos_embed, vit.pos_embed, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "vit_small_patch16_224"}, r"model = 'vit_small_patch16_224' is asked for.*'vit_tiny_patch16_224'"),
        ({"patch_size": 14}, r"patch_size = 14 is asked for, but in init .* it is 7"),
        ({"layer_scale": None}, r"layer_scale = None is asked for, but in init .* it is 0.1"),
        ({"model_args": {"depth": 3}}, r"model_args depth = 3 is asked for, but in init .* it is 2"),
        ({"model_args": {"qk_norm": True}}, r"model_args qk_norm = True.* it is \"the model's own\""),
        ({"image_size": 30}, r"image size 30 is not divisible by the patch size 7"),
        ({"init": "resnet18"}, r"init 'resnet18' cannot be pre-trained further: the backbone is a ResNet"),
        ({"init": ""}, "init = .*at least 1 character"),
    ],
)
def test_contradictions_of_the_source_are_refused(
    change: dict[str, Any], says: str, source: Path, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(MapetError, match=says):
        pretrain({**MORE, "data": str(digits), "init": str(source), "steps": 1, **change}, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: save({**weights, "norm.bias": weights["norm.bias"] / 0}), "NaN or infinity"),
        (lambda weights: save(weights)[:5000], "is damaged"),
    ],
)
def test_damaged_source_is_refused(
    change: Callable[..., bytes], says: str, copied_source: Path, digits: Path, tmp_path: Path
) -> None:
    path = copied_source / "exported" / "model.safetensors"
    path.write_bytes(change(load_file(path)))
    with pytest.raises(MapetError, match=says):
        continue_run(digits, tmp_path / "run", copied_source, steps=1)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_demo_takes_no_init(tmp_path: Path) -> None:
    """It compares with random weights."""
    with pytest.raises(MapetError, match="random weights; leave --init out"):
        run_demo({**TINY, "data": "mnist", "init": "vit_tiny_patch16_224"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
