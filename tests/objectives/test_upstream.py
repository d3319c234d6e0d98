from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mapet import MaPeT, MapetError, load_upstream


def test_finetuned_features_and_logits(oracle: Callable[..., Any]) -> None:
    recorded = oracle("finetuned")
    model = load_upstream(recorded.state_dict, recorded.config).eval()
    images = recorded.tensors["images"]
    assert (model.forward_features(images) - recorded.tensors["features"]).abs().max() <= 1e-5
    assert (model(images) - recorded.tensors["logits"]).abs().max() <= 1e-5


def test_a_released_tar_file_with_module_prefix(oracle: Callable[..., Any], tmp_path: Path) -> None:
    recorded = oracle("pretrain")
    state = {f"module.{name}": tensor for name, tensor in recorded.state_dict.items()}
    torch.save({"state_dict": state, "epoch": 300, "arch": "mapet_tiny"}, tmp_path / "checkpoint.tar")
    objective = load_upstream(tmp_path / "checkpoint.tar", recorded.config)
    assert isinstance(objective, MaPeT)
    tensors = recorded.tensors
    output = objective(tensors["images"], tensors["token_ids"], tensors["order"])
    assert (output["logits"] - tensors["logits"]).abs().max() <= 1e-5


def test_published_shapes_need_no_config(oracle: Callable[..., Any]) -> None:
    """64 channels a head, class token counted in a context of 50: what all published models have."""
    recorded = oracle("pretrain")
    shapes = {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 197, 192),
        "mask_positional_token": (1, 1, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "patch_embed.proj.bias": (192,),
        "decoder.weight": (8192, 192),
        "decoder.bias": (8192,),
        "norm.weight": (192,),
        "norm.bias": (192,),
    }
    for block in range(12):
        for name, tensor in recorded.state_dict.items():
            if name.startswith("blocks.0."):
                shape = tuple(192 * side // 48 for side in tensor.shape)
                shapes[name.replace("blocks.0.", f"blocks.{block}.")] = shape
    objective = load_upstream({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert isinstance(objective, MaPeT)
    assert objective.context_tokens == 50
    assert objective.backbone.blocks[0].attn.num_heads == 3
    assert len(objective.backbone.blocks) == 12


def test_safetensors_files_are_read(oracle: Callable[..., Any], tmp_path: Path) -> None:
    recorded = oracle("finetuned")
    save_file(recorded.state_dict, tmp_path / "model.safetensors")
    assert load_upstream(tmp_path / "model.safetensors", recorded.config).num_classes == 10


def test_bad_files_are_refused(oracle: Callable[..., Any], tmp_path: Path) -> None:
    recorded = oracle("pretrain")
    with pytest.raises(MapetError, match="do not exist"):
        load_upstream(tmp_path / "missing.tar")
    torch.save({"state_dict": recorded.state_dict}, tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MapetError, match=r"cut\.tar cannot be read"):
        load_upstream(tmp_path / "cut.tar")
    with pytest.raises(MapetError, match="holds no upstream MaPeT model"):
        load_upstream({"weight": torch.zeros(1)})
    with pytest.raises(MapetError, match=r"does not fit its architecture.*strange"):
        load_upstream({**recorded.state_dict, "strange": torch.zeros(1)}, recorded.config)
    with pytest.raises(MapetError, match="says depth is 4, but the checkpoint's is 3"):
        load_upstream(recorded.state_dict, {**recorded.config, "depth": 4})
    with pytest.raises(MapetError, match=r"unknown key 'num_head'.*'num_heads'"):
        load_upstream(recorded.state_dict, {"num_head": 3})


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "evil.tar")
    with pytest.raises(MapetError, match="cannot be read as tensors"):
        load_upstream(tmp_path / "evil.tar")


def test_scalars_where_matrices_belong_are_named(oracle: Callable[..., Any]) -> None:
    recorded = oracle("pretrain")
    for name in ("decoder.bias", "decoder.weight", "mask_positional_token", "pos_embed", "blocks.0.mlp.fc1.weight"):
        with pytest.raises(MapetError, match=r"has shape \(\)"):
            load_upstream({**recorded.state_dict, name: torch.tensor(1.0)}, recorded.config)
    scalars = {f"blocks.0.attn.{part}.weight": torch.tensor(1.0) for part in ("q", "kv")}
    with pytest.raises(MapetError, match="no 'kv' projection that goes with it"):
        load_upstream({**recorded.state_dict, **scalars}, recorded.config)
