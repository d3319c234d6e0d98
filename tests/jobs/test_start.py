from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests.conftest import TINY
from tests.jobs.test_pretrain import QUIET, command, curve, lines, run
from timm.models.vision_transformer import VisionTransformer

from mapet import MapetError
from mapet.cli import main
from mapet.config.base import make_config
from mapet.inference.models import open_model
from mapet.jobs.bootstrap.run import bootstrap
from mapet.jobs.convert.run import convert
from mapet.jobs.demo.run import run_demo
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.pretrain.run import initial_backbone, pretrain
from mapet.jobs.pretrain.start import Start, inherit, read_start
from mapet.models.export import export_network
from mapet.tokenizers.files import save_tokenizer
from mapet.tokenizers.kpixels import KPixels

# What a run needs besides --init, which says the rest.
MORE = {"batch_size": 8, "lr": 1e-3, "workers": 0, "vocab_size": 16}


def more(data: Path, out: Path, init: Path | str, **values: Any) -> Any:
    return pretrain({**MORE, "data": str(data), "init": str(init), **values}, out, console=QUIET)


def checkpoint(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "last" / "objective.safetensors")


@pytest.fixture(scope="module")
def source(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source") / "run"
    run(digits, out, steps=3, objective="pim", mean=[0.3], std=[0.4])
    return out


def backbone_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}


def random_tokenizer(folder: Path, image_size: int, patch_size: int, channels: int, vocab_size: int) -> None:
    tokenizer = KPixels(image_size, patch_size, channels, vocab_size)
    tokenizer.centroids.normal_(generator=torch.Generator().manual_seed(0))
    folder.mkdir()
    save_tokenizer(tokenizer, folder)


@pytest.fixture
def before_steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The objective's weights as the loop finds them before its first step."""
    from mapet.engine import training

    seen: dict[str, torch.Tensor] = {}
    real = training.train

    def spy(trainee: Any, *arguments: Any, **options: Any) -> int:
        seen.update({name: tensor.clone() for name, tensor in trainee.objective.state_dict().items()})
        return real(trainee, *arguments, **options)

    monkeypatch.setattr(training, "train", spy)
    return seen


def test_a_run_is_continued_with_its_architecture_and_backbone(
    source: Path, digits: Path, tmp_path: Path, before_steps: dict[str, torch.Tensor]
) -> None:
    result = more(digits, tmp_path / "run", source, steps=2)
    config = result.config
    assert (config.model, config.patch_size, config.channels) == ("vit_tiny_patch16_224", 7, 1)
    assert (config.image_size, config.layer_scale, config.mean, config.std) == (28, 0.1, (0.3,), (0.4,))
    assert config.model_args == TINY["model_args"]
    assert config.objective == "mapet"
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["init"], saved["init_parts"]) == (str(source), "backbone")
    before = checkpoint(source)
    for name, tensor in backbone_of(before).items():
        assert torch.equal(before_steps[f"backbone.{name}"], tensor), name
    assert not torch.equal(before_steps["mask_token"], before["mask_token"])
    assert not torch.equal(before_steps["head.weight"], before["head.weight"])


def test_all_parts_go_on_where_the_source_stopped(
    source: Path, digits: Path, tmp_path: Path, before_steps: dict[str, torch.Tensor]
) -> None:
    result = more(digits, tmp_path / "run", source, init_parts="all", steps=1, vocab_size=None)
    assert (result.config.objective, result.config.vocab_size) == ("pim", None)
    before = checkpoint(source)
    assert before_steps.keys() == before.keys()
    assert all(torch.equal(before_steps[name], tensor) for name, tensor in before.items())
    name = "tokenizer/tokenizer.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (source / name).read_bytes()


def test_learning_goes_on(digits: Path, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"crop_min": 1.0, "flip": 0.0, "beta2": 0.98}
    run(digits, tmp_path / "a", steps=40, lr=3e-3, **plain)
    losses = [line["loss"] for line in lines(tmp_path / "a")]
    more(digits, tmp_path / "b", tmp_path / "a", init_parts="all", vocab_size=None, steps=2, lr=1e-5, **plain)
    assert max(line["loss"] for line in lines(tmp_path / "b")) < sum(losses[:5]) / 5 - 0.2


def test_a_stopped_run_resumes_exactly_without_its_source(source: Path, digits: Path, tmp_path: Path) -> None:
    """Killed before its first ordinary checkpoint; then the source is gone."""
    shutil.copytree(source, tmp_path / "source")
    recipe = {"init": str(tmp_path / "source"), "init_parts": "all", "steps": 60, "checkpoint_every": 50}
    recipe |= {"objective": "pim", "mean": [0.3], "std": [0.4], "vocab_size": None, "channels": 1, "image_size": 28}
    recipe |= {"tokenizer": str(tmp_path / "source" / "tokenizer")}
    pretrain({**TINY, "data": str(digits), **recipe}, tmp_path / "whole", console=QUIET)
    out = tmp_path / "killed"
    process = subprocess.Popen(command(digits, out, **recipe), stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_bytes().split(b"\n")) > 4:
            process.kill()
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL
    assert json.loads((out / "checkpoints" / "last" / "state.json").read_text())["step"] == 0
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(MapetError, match=r"'init' is '.*elsewhere', but the run in .* began with"):
        pretrain({"init": str(tmp_path / "elsewhere")}, out, resume=True, console=QUIET)
    with pytest.raises(MapetError, match=r"'init_parts' is 'backbone', but the run"):
        pretrain({"init_parts": "backbone"}, out, resume=True, console=QUIET)
    pretrain({"init": recipe["init"]}, out, resume=True, console=QUIET)
    assert curve(out) == curve(tmp_path / "whole")
    same = [(path / "exported" / "model.safetensors").read_bytes() for path in (out, tmp_path / "whole")]
    assert same[0] == same[1]


def test_a_run_that_never_began_reads_its_source_again(
    source: Path, digits: Path, tmp_path: Path, before_steps: dict[str, torch.Tensor]
) -> None:
    more(digits, tmp_path / "run", source, steps=1)
    first = dict(before_steps)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before_steps.clear()
    pretrain({}, tmp_path / "run", resume=True, console=QUIET)
    assert all(torch.equal(before_steps[name], tensor) for name, tensor in first.items())


def begin(data: Path, init: Path | str, **values: Any) -> tuple[PretrainConfig, VisionTransformer]:
    """The configuration and the backbone that a run begins with."""
    config = make_config(PretrainConfig, inherit({**MORE, "data": str(data), "init": str(init), **values}))
    backbone = initial_backbone(config)
    read_start(config).load_backbone(backbone, config.model)
    return config, backbone


def test_image_size_and_channels_may_differ(source: Path, digits: Path) -> None:
    config, backbone = begin(digits, source, image_size=42, channels=3)
    assert config.input_mean == (0.485, 0.456, 0.406)
    # timm itself, asked for the same of the same file.
    expected = timm.create_model(f"local-dir:{source / 'exported'}", pretrained=True, img_size=42, in_chans=3)
    assert backbone.pos_embed.shape == (1, 37, 32)
    images = torch.randn(2, 3, 42, 42)
    assert torch.allclose(backbone.eval()(images), expected.eval()(images), atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"reg_tokens": 2}, {"class_token": False}, {"reg_tokens": 1, "no_embed_class": True}]
)
def test_register_tokens_and_no_class_token(
    changes: dict[str, Any], tiny_vit: Callable[..., Any], digits: Path, tmp_path: Path
) -> None:
    vit = tiny_vit(channels=1, **changes).eval()
    export_network(vit, tmp_path, (0.5,), (0.5,))
    config, backbone = begin(digits, tmp_path)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(backbone.eval()(images), vit(images))
    assert (config.mean, config.layer_scale) == ((0.5,), None)
    larger = begin(digits, tmp_path, image_size=42)[1].eval()
    vit.set_input_size(img_size=(42, 42))
    images = torch.randn(2, 1, 42, 42)
    assert torch.allclose(larger(images), vit(images), atol=1e-6)


def test_a_timm_model_opened_with_random_weights_and_exported(digits: Path, tmp_path: Path) -> None:
    opened = open_model("vit_tiny_patch16_224", reinit=True, image_size=(32, 32))
    export_network(opened.network, tmp_path, opened.view.mean, opened.view.std)
    config, backbone = begin(digits, tmp_path)
    assert (config.model, config.image_size, config.mean) == ("vit_tiny_patch16_224", 32, (0.5, 0.5, 0.5))
    assert torch.equal(backbone.blocks[11].mlp.fc2.weight, opened.network.blocks[11].mlp.fc2.weight)


def test_a_classifier_gives_its_backbone(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mean-pooled before its norm: head and that norm are not taken over, and the norm is named."""
    caplog.set_level(logging.INFO)
    vit = timm.create_model(
        "vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5, global_pool="avg", fc_norm=True
    )
    torch.nn.init.normal_(vit.fc_norm.weight)
    export_network(vit, tmp_path, (0.5,) * 3, (0.5,) * 3)
    config, backbone = begin(digits, tmp_path)
    assert (config.channels, config.model_args, config.layer_scale) == (3, {"depth": 1}, None)
    assert torch.equal(backbone.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    assert torch.equal(backbone.norm.weight, torch.ones(192))
    assert "not taken over: fc_norm.weight, fc_norm.bias; begun anew: norm.weight, norm.bias" in caplog.text


def test_an_oblong_source_needs_a_size(tiny_vit: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    vit = tiny_vit(channels=1)
    vit.set_input_size(img_size=(28, 56))
    export_network(vit, tmp_path, (0.5,), (0.5,))
    with pytest.raises(MapetError, match=r"takes images of 28 x 56 pixels, and pre-training takes squares"):
        begin(digits, tmp_path)
    vit.set_input_size(img_size=(28, 28))
    assert torch.allclose(begin(digits, tmp_path, image_size=28)[1].pos_embed, vit.pos_embed, atol=1e-6)


def test_a_converted_checkpoint_of_the_authors_is_continued(
    oracle: Callable[..., Any],
    photographs: Path,
    tmp_path: Path,
    before_steps: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorded = oracle("pretrain")
    torch.save({"state_dict": recorded.state_dict, "epoch": 300}, tmp_path / "upstream.tar")
    convert({"file": str(tmp_path / "upstream.tar"), "num_heads": 3}, tmp_path / "converted")
    random_tokenizer(tmp_path / "t", 64, 8, 3, 97)  # of as many ids as the authors' head has
    options: dict[str, Any] = {"steps": 1, "init_parts": "all", "tokenizer": str(tmp_path / "t"), "vocab_size": None}
    result = more(photographs, tmp_path / "run", tmp_path / "converted", **options)
    assert (result.config.model_args["num_heads"], result.config.objective) == (3, "mapet")
    assert torch.equal(before_steps["mask_token"], recorded.state_dict["mask_positional_token"])
    assert torch.equal(before_steps["head.weight"], recorded.state_dict["decoder.weight"])
    assert torch.equal(before_steps["backbone.pos_embed"], recorded.state_dict["pos_embed"])
    assert "nothing tells which tokenizer the head of" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "vit_small_patch16_224"}, r"model = 'vit_small_patch16_224' is asked for.*'vit_tiny_patch16_224'"),
        ({"patch_size": 14}, r"patch_size = 14 is asked for, but in init .* it is 7"),
        ({"layer_scale": None}, r"layer_scale = None is asked for, but in init .* it is 0.1"),
        ({"model_args": {"depth": 3}}, r"model_args depth = 3 is asked for, but in init .* it is 2"),
        ({"model_args": {"qk_norm": True}}, r"model_args qk_norm = True.* it is \"the model's own\""),
        ({"image_size": 30}, r"image size 30 is not divisible by the patch size 7"),
        ({"init": "vit_tiny_patch16_225"}, r"unknown model 'vit_tiny_patch16_225'"),
        ({"init": "resnet18"}, r"init 'resnet18' cannot be pre-trained further: the backbone is a ResNet"),
        ({"init": "/no/run"}, r"model folder '/no/run' does not exist"),
        ({"init": ""}, r"init = ''"),
        ({"init": None, "init_parts": "all"}, r"init_parts is 'all', but there is no init"),
        ({"init_parts": "all", "tokenizer": "pixels"}, r"predicts the ids of the tokenizer that it was trained with"),
    ],
)
def test_what_contradicts_the_source_is_refused(
    change: dict[str, Any], says: str, source: Path, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(MapetError, match=says):
        pretrain({**MORE, "data": str(digits), "init": str(source), "steps": 1, **change}, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_another_tokenizer_is_refused_for_the_head(source: Path, digits: Path, tmp_path: Path) -> None:
    random_tokenizer(tmp_path / "other", 28, 7, 1, 16)
    options: dict[str, Any] = {"init_parts": "all", "steps": 1, "vocab_size": None}
    with pytest.raises(MapetError, match="whose tokenizer is another one than this"):
        more(digits, tmp_path / "run", source, tokenizer=str(tmp_path / "other"), **options)
    with pytest.raises(MapetError, match="holds no mask vector and head"):
        more(digits, tmp_path / "run", source / "exported", tokenizer=str(source / "tokenizer"), **options)
    assert not (tmp_path / "run" / "config.yaml").exists()
    head = {"mask_token": torch.zeros(1, 1, 32), "head.weight": torch.zeros(16, 32), "head.bias": torch.zeros(16)}
    Start("x", {}, head, "hash").check_ids("hash", 16)
    with pytest.raises(MapetError, match="whose tokenizer is one of 16 ids, not 9"):
        Start("x", {}, head).check_ids("hash", 9)


def test_another_size_is_named_before_what_follows_from_it(source: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="was pre-trained at 28 px, this run is to be at 42 px: .* leave --image-size"):
        more(digits, tmp_path / "run", source, init_parts="all", image_size=42, steps=1, vocab_size=None)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("mask_token", lambda tensor: tensor[..., :9], r"'mask_token' has shape \(1, 1, 9\) instead of \(1, 1, 32\)"),
        ("head.weight", lambda tensor: tensor.sum(), r"'head.weight' has shape \(\) instead of \(32,\)"),
        ("head.bias", lambda tensor: tensor[:9], r"'head.bias' has shape \(9,\) instead of \(16,\)"),
        ("head.bias", lambda tensor: tensor.long(), "holds 'head.bias' as integers"),
        ("backbone.norm.bias", lambda tensor: tensor.long(), "holds 'backbone.norm.bias' as integers"),
        (
            "backbone.norm.bias",
            lambda tensor: tensor.to(torch.float8_e4m3fn),
            "'backbone.norm.bias' .*is of type float8",
        ),
        ("backbone.norm.bias", lambda tensor: tensor[:9], r"'norm.bias' is \(9,\) in the one and \(32,\)"),
    ],
)
def test_odd_tensors_of_a_checkpoint_are_named(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], says: str, source: Path, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    path = tmp_path / "source" / "checkpoints" / "last" / "objective.safetensors"
    weights = load_file(path)
    save_file({**weights, name: change(weights[name]).contiguous()}, path)
    with pytest.raises(MapetError, match=says):
        more(digits, tmp_path / "run", tmp_path / "source", steps=1, init_parts="all", vocab_size=None)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_weights_that_are_not_finite_are_refused(source: Path, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    for file, parts in (("exported/model", "backbone"), ("checkpoints/last/objective", "all")):
        path = tmp_path / "source" / f"{file}.safetensors"
        whole, weights = path.read_bytes(), load_file(path)
        next(iter(weights.values())).view(-1)[0] = float("nan")
        save_file(weights, path)
        with pytest.raises(MapetError, match="NaN or infinity"):
            more(digits, tmp_path / "run", tmp_path / "source", steps=1, init_parts=parts, vocab_size=None)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(MapetError, match="cannot be read|is damaged"):
            more(digits, tmp_path / "run", tmp_path / "source", steps=1, init_parts=parts, vocab_size=None)
        path.write_bytes(whole)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"embed_dim": 64},
            r"init 'x' does not fit model 'y': 'cls_token' is \(1, 1, 64\) in the one and \(1, 1, 32\)",
        ),
        ({"depth": 3}, r"'x' has 'blocks\.2\..*', which 'y' lacks \(12 tensors differ\)"),
        ({"depth": 1}, r"'y' has 'blocks\.1\..*', which 'x' lacks \(12 tensors differ\)"),
        ({"layer_scale": 0.1}, r"'x' has 'blocks.0.ls1.gamma', which 'y' lacks"),
    ],
)
def test_weights_of_another_shape_are_named(changes: dict[str, Any], says: str, tiny_vit: Callable[..., Any]) -> None:
    with pytest.raises(MapetError, match=says):
        Start("x", tiny_vit(**changes).state_dict()).load_backbone(tiny_vit(), "y")


def test_jobs_that_compare_with_random_weights_refuse_it(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="bootstrapping begins with random weights"):
        bootstrap({**TINY, "data": str(digits), "init": "vit_tiny_patch16_224"}, tmp_path / "run")
    with pytest.raises(MapetError, match="the demo compares with random weights"):
        run_demo({**TINY, "data": "mnist", "init": "vit_tiny_patch16_224"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_source_is_all_it_takes_on_the_command_line(source: Path, digits: Path, tmp_path: Path) -> None:
    arguments = ["pretrain", str(digits), "--init", str(source), "--out", str(tmp_path / "run")]
    arguments += ["--batch-size", "8", "--steps", "1", "--vocab-size", "16", "--workers", "0"]
    assert main(arguments) == 0
    assert main([*arguments, "--resume"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model_args"] == TINY["model_args"]
