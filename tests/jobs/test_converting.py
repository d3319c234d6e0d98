"""Files as their authors wrote them: their key names and shapes, made from timm's own networks by the renamings."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo
from timm.models import vision_transformer
from torch import Tensor, nn

import mapet
from mapet import MapetError
from mapet.jobs.convert.run import convert

TINY_SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def randomised(name: str, **arguments: Any) -> nn.Module:
    """A timm network none of whose weights has its neutral initial value."""
    torch.manual_seed(0)
    network = timm.create_model(name, **{**TINY_SHAPE, "num_classes": 5, **arguments}).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def write(path: Path, state: dict[str, Tensor], under: str = "model", **others: Any) -> Path:
    torch.save({under: state, "epoch": 99, "args": argparse.Namespace(lr=1e-3), **others}, path)
    return path


def same_output(network: nn.Module, folder: Path) -> None:
    loaded, transform = mapet.load(folder)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
        assert torch.equal(loaded.forward_features(images), network.forward_features(images))
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), network(images))
    assert transform(np.zeros((50, 40, 3), np.uint8)).shape == (3, 32, 32)


def test_the_authors_classifier_gives_their_logits(oracle: Callable[..., Any], tmp_path: Path) -> None:
    recorded = oracle("finetuned")
    state = {f"module.{name}": tensor for name, tensor in recorded.state_dict.items()}
    torch.save({"state_dict": state, "epoch": 300, "arch": "mapet_tiny"}, tmp_path / "finetuned.tar")
    result = convert(
        {"kind": "upstream", "file": str(tmp_path / "finetuned.tar"), "num_heads": 3, "crop_pct": 0.9}, tmp_path / "out"
    )
    assert (result["image_size"], result["channels"], result["classes"], result["pretraining"]) == (64, 3, 10, False)
    assert result["others"] == ["arch", "epoch"]
    model, transform = mapet.load(tmp_path / "out")
    images = recorded.tensors["images"]
    logits = (model(images) - recorded.tensors["logits"]).abs().max()
    features = (model.forward_features(images) - recorded.tensors["features"]).abs().max()
    print(f"largest difference: logits {logits:.1e}, features {features:.1e}")
    assert max(logits, features) < 1e-5
    view = transform.view
    assert (view.mean, view.crop_pct) == ((0.485, 0.456, 0.406), 0.9)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_the_authors_pretraining_checkpoint_keeps_mask_vector_and_head(
    oracle: Callable[..., Any], tmp_path: Path
) -> None:
    recorded = oracle("pretrain")
    torch.save({"state_dict": recorded.state_dict, "optimizer": {"state": {}}}, tmp_path / "pretrain.tar")
    result = convert({"kind": "upstream", "file": str(tmp_path / "pretrain.tar"), "num_heads": 3}, tmp_path / "out")
    assert (result["classes"], result["pretraining"], result["others"]) == (0, True, ["optimizer"])
    parts = load_file(tmp_path / "out" / "pretraining.safetensors")
    theirs = {"mask_token": "mask_positional_token", "head.weight": "decoder.weight", "head.bias": "decoder.bias"}
    assert parts.keys() == theirs.keys()
    assert all(torch.equal(parts[ours], recorded.state_dict[name]) for ours, name in theirs.items())
    # The whole objective, put together from the folder, gives the recorded logits.
    backbone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    objective = mapet.MaPeT(backbone, 97, recorded.config["context_tokens"]).eval()
    objective.load_state_dict(parts, strict=False)
    tensors = recorded.tensors
    output = objective(tensors["images"], tensors["token_ids"], tensors["order"])
    assert (output["logits"] - tensors["logits"]).abs().max() < 1e-5


def test_the_published_sizes_are_told_by_name_and_have_imagenets_classes(tmp_path: Path) -> None:
    """What the six published classifiers are: T, S and B, 1000 classes, mean pooling."""
    network = timm.create_model("vit_tiny_patch16_224", global_pool="avg", fc_norm=True, init_values=0.1)
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if ".attn.qkv." in name:
            state[name.replace("qkv", "q")], state[name.replace("qkv", "kv")] = tensor.split([192, 384])
        else:
            state[name] = tensor
    torch.save({"state_dict": state, "epoch": 300, "arch": "vit_tiny"}, tmp_path / "t.tar")
    result = convert({"kind": "upstream", "file": str(tmp_path / "t.tar")}, tmp_path / "out")
    assert (result["architecture"], result["classes"], result["image_size"]) == ("vit_tiny_patch16_224", 1000, 224)
    loaded = mapet.load(tmp_path / "out")
    assert loaded.model.blocks[0].attn.num_heads == 3
    assert loaded.classes == tuple(ImageNetInfo().label_names())
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(loaded.model(images), network.eval()(images))


@pytest.mark.parametrize("kind", ["beit", "beitv2"])
def test_a_finetuned_beit(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network = randomised("beit_base_patch16_224")
    state = network.state_dict()
    for block in range(2):  # a buffer of theirs
        index = torch.zeros(17, 17, dtype=torch.long)
        state[f"blocks.{block}.attn.relative_position_index"] = index
    assert state["blocks.0.attn.relative_position_bias_table"].shape == (7**2 + 3, 3)
    assert {"blocks.1.attn.q_bias", "blocks.1.attn.v_bias", "blocks.0.gamma_1", "fc_norm.weight"} <= state.keys()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    write(tmp_path / "beit.pth", state, "module", optimizer=optimizer, model_ema={"a": torch.zeros(1)})
    result = convert({"kind": kind, "file": str(tmp_path / "beit.pth")}, tmp_path / "out")
    assert result["architecture"] == f"{kind}_base_patch16_224"
    assert result["left_out"] == [f"blocks.{block}.attn.relative_position_index" for block in range(2)]
    assert result["others"] == ["args", "epoch", "model_ema", "optimizer"]
    assert "besides the weights, not used: args, epoch, model_ema, optimizer" in caplog.text
    same_output(network, tmp_path / "out")
    mean = mapet.load(tmp_path / "out").transform.view.mean
    assert mean == ((0.5,) * 3 if kind == "beit" else (0.485, 0.456, 0.406))


@pytest.mark.parametrize("kind", ["beit", "beitv2"])
def test_a_pretrained_beit_shares_its_position_bias(kind: str, tmp_path: Path) -> None:
    shared = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False, "num_classes": 0}
    network = randomised("beit_base_patch16_224", **shared)
    state = network.state_dict()
    state |= {
        "mask_token": torch.zeros(1, 1, 48),
        "lm_head.weight": torch.zeros(16, 48),
        "lm_head.bias": torch.zeros(16),
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long),
    }
    dropped = {"mask_token", "lm_head.weight", "lm_head.bias", "rel_pos_bias.relative_position_index"}
    if kind == "beitv2":
        state |= {f"cls_pt_layers.0.{name}": torch.zeros(48) for name in ("gamma_1", "norm1.weight")}
        dropped |= {"cls_pt_layers.0.gamma_1", "cls_pt_layers.0.norm1.weight"}
    write(tmp_path / "pt.pth", state)
    result = convert({"kind": kind, "file": str(tmp_path / "pt.pth")}, tmp_path / "out")
    assert set(result["left_out"]) == dropped
    assert result["classes"] == 0
    same_output(network, tmp_path / "out")
    if kind == "beitv2":
        with pytest.raises(
            MapetError, match=r"holds no Vision Transformer of BEiT; it is BEiT v2's: use mapet convert"
        ):
            convert({"kind": "beit", "file": str(tmp_path / "pt.pth")}, tmp_path / "other")


@pytest.mark.parametrize("decoder", [True, False])
def test_a_pretrained_mae(decoder: bool, tmp_path: Path) -> None:
    network = randomised("vit_base_patch16_224", num_classes=0, global_pool="avg", fc_norm=False)
    state = network.state_dict()
    extra = {
        "mask_token": torch.zeros(1, 1, 24),
        "decoder_pos_embed": torch.zeros(1, 17, 24),
        "decoder_embed.weight": torch.zeros(24, 48),
        "decoder_embed.bias": torch.zeros(24),
        "decoder_blocks.0.norm1.weight": torch.zeros(24),
        "decoder_norm.weight": torch.zeros(24),
        "decoder_pred.weight": torch.zeros(192, 24),
        "decoder_pred.bias": torch.zeros(192),
    }
    write(tmp_path / "mae.pth", state | extra if decoder else state)
    result = convert({"kind": "mae", "file": str(tmp_path / "mae.pth"), "num_heads": 3}, tmp_path / "out")
    assert result["left_out"] == (sorted(extra) if decoder else [])
    same_output(network, tmp_path / "out")


@pytest.mark.parametrize(("pool", "norm"), [("avg", True), ("token", False)])
def test_a_finetuned_mae(pool: str, norm: bool, tmp_path: Path) -> None:
    network = randomised("vit_base_patch16_224", global_pool=pool, fc_norm=norm)
    write(tmp_path / "mae.pth", network.state_dict())
    convert({"kind": "mae", "file": str(tmp_path / "mae.pth"), "num_heads": 3}, tmp_path / "out")
    same_output(network, tmp_path / "out")
    # What timm reads from the same file, by its own filter.
    filtered = vision_transformer.checkpoint_filter_fn(network.state_dict(), network)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == filtered.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in filtered.items())


def test_a_model_that_is_named_must_fit(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=12)
    save_file(network.state_dict(), tmp_path / "mae.safetensors")
    values = {"kind": "mae", "file": str(tmp_path / "mae.safetensors")}
    assert convert({**values, "model": "vit_tiny_patch16_224"}, tmp_path / "out")["image_size"] == 32
    for model, says in (
        ("vit_small_patch16_224", r"do not fit model 'vit_small_patch16_224': '.*' has shape .*192.* instead of .*384"),
        ("vit_tiny_patch16_225", r"unknown model 'vit_tiny_patch16_225'; did you mean"),
        ("resnet18", r"timm cannot build model 'resnet18'"),
    ):
        with pytest.raises(MapetError, match=says):
            convert({**values, "model": model}, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {}, "holds no Vision Transformer of MAE; it is none that can be converted"),
        (lambda state: {"weight": torch.zeros(2)}, "it is none that can be converted"),
        (lambda state: {**state, "blocks.0.attn.q_bias": torch.zeros(48)}, "it is BEiT's: use mapet convert beit"),
        (
            lambda state: {**state, "strange.weight": torch.zeros(2)},
            "it has no place for strange.weight; name the model",
        ),
        (lambda state: {**state, "head.0.weight": torch.zeros(2)}, "it has no place for head.0.weight"),
        (
            lambda state: {**state, "norm.bias": torch.full((48,), torch.nan)},
            r"contain NaN or infinity \(first 'norm.bias'",
        ),
        (
            lambda state: {k: v for k, v in state.items() if k != "norm.bias"},
            r"do not fit model .*'norm.bias' is missing",
        ),
        (
            lambda state: {**state, "blocks.99999.norm1.weight": torch.zeros(48)},
            "has 'blocks.99999', but no 'blocks.2'",
        ),
        (
            lambda state: {**state, "norm.bias": torch.zeros(48, dtype=torch.long)},
            "'norm.bias' is of type int64, not of floats",
        ),
        (
            lambda state: {**state, "norm.bias": state["norm.bias"].to(torch.float8_e4m3fn)},
            r"tensor 'norm.bias' in weights .*file.pth is of type float8_e4m3fn",
        ),
        (lambda state: {**state, "norm.bias": torch.tensor(1.0)}, r"'norm.bias' has shape \(\) instead of \(48,\)"),
        (lambda state: {**state, "norm.bias": torch.zeros(9)}, r"'norm.bias' has shape \(9,\) instead of \(48,\)"),
        (lambda state: {**state, "pos_embed": torch.zeros(1, 13, 48)}, "is for 12 patches, which is no square grid"),
        (lambda state: {**state, "pos_embed": torch.zeros(48)}, r"'pos_embed' has shape \(48,\), but 3 dimensions"),
        (
            lambda state: {**state, "patch_embed.proj.weight": torch.zeros(48, 5, 8, 8)},
            r"5 channel\(s\), but mean has 3",
        ),
    ],
)
def test_files_that_do_not_fit_are_one_sentence_and_nothing_is_written(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str, tmp_path: Path
) -> None:
    state = randomised("vit_base_patch16_224", num_classes=0).state_dict()
    write(tmp_path / "file.pth", change(state))
    with pytest.raises(MapetError, match=says):
        convert({"kind": "mae", "file": str(tmp_path / "file.pth"), "num_heads": 3}, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"file.pth"}


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (
            "mask_positional_token",
            torch.zeros(1, 1, 17),
            r"'mask_token' has shape \(1, 1, 17\) instead of \(1, 1, 48\)",
        ),
        ("decoder.weight", torch.zeros(97, 17), r"'head.weight' has shape \(97, 17\) instead of \(97, 48\)"),
        ("decoder.bias", torch.zeros(96), r"'head.bias' has shape \(96,\) instead of \(97,\)"),
        ("decoder.bias", torch.tensor(1.0), r"'head.bias' has shape \(\), but 1 dimensions are expected"),
        ("decoder.bias", None, "lacks 'head.bias'"),
    ],
)
def test_mask_vector_and_head_must_fit(
    name: str, tensor: Tensor | None, says: str, oracle: Callable[..., Any], tmp_path: Path
) -> None:
    state = {**oracle("pretrain").state_dict, name: tensor}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "file.pth")
    with pytest.raises(MapetError, match=f"file.pth cannot be converted: .*{says}"):
        convert({"kind": "upstream", "file": str(tmp_path / "file.pth"), "num_heads": 3}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_that_are_assumed_are_said(tmp_path: Path) -> None:
    wide = randomised("vit_base_patch16_224", embed_dim=64, num_heads=1)
    write(tmp_path / "vit.pth", wide.state_dict())
    write(tmp_path / "beit.pth", randomised("beit_base_patch16_224").state_dict())
    for file, values, expected in (
        ("vit", {"kind": "mae"}, (1, True)),
        ("vit", {"kind": "mae", "num_heads": 2}, (2, False)),
        ("beit", {"kind": "beit"}, (3, False)),
    ):
        result = convert({**values, "file": str(tmp_path / f"{file}.pth")}, tmp_path / f"out{expected}{file}")
        assert (result["num_heads"], result["num_heads_assumed"]) == expected


def test_heads_that_tensors_do_not_tell(tmp_path: Path) -> None:
    write(tmp_path / "vit.pth", randomised("vit_base_patch16_224").state_dict())
    write(tmp_path / "beit.pth", randomised("beit_base_patch16_224").state_dict())
    for kind, heads, says in (
        ("mae", None, "is 48 wide, which is no multiple of the usual 64 channels a head.*pass --num-heads"),
        ("mae", 5, "num_heads is 5, which does not divide the checkpoint's width of 48"),
        ("beit", 4, "num_heads is 4, but the checkpoint's position bias is for 3 heads"),
    ):
        file = tmp_path / ("beit.pth" if kind == "beit" else "vit.pth")
        with pytest.raises(MapetError, match=says):
            convert({"kind": kind, "file": str(file), "num_heads": heads}, tmp_path / "out")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    state = randomised("vit_base_patch16_224").state_dict()
    whole = write(tmp_path / "whole.pth", state).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    torch.save([1, 2], tmp_path / "list.pth")
    write(tmp_path / "evil.pth", state, optimizer=Evil())
    for name, says in (
        ("missing.pth", "do not exist"),
        ("cut.pth", r"cannot be read as tensors \(.*cut short"),
        ("text.pth", r"cannot be read as tensors \(.*no checkpoint"),
        ("cut.safetensors", "cannot be read as tensors"),
        ("list.pth", "holds a list, not a state dict"),
        ("evil.pth", "they need the Python object .*exec, and loading that might run code"),
    ):
        with pytest.raises(MapetError, match=says):
            convert({"kind": "mae", "file": str(tmp_path / name), "num_heads": 3}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    write(tmp_path / "mae.pth", randomised("vit_base_patch16_224").state_dict())
    with pytest.raises(MapetError, match="is there already and is not empty"):
        convert({"kind": "mae", "file": str(tmp_path / "mae.pth"), "num_heads": 3}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(MapetError, match="the name of the output folder is empty"):
        convert({"kind": "mae", "file": str(tmp_path / "mae.pth"), "num_heads": 3}, "")
