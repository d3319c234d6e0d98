from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mapet import MaPeT, MapetError, Mask, load_upstream


def test_pretraining_equals_the_authors(oracle: Callable[..., Any], tmp_path: Path) -> None:
    """Predictions and loss within 1e-5 in float32, gradients within 1e-4."""
    recorded = oracle("pretrain")
    state = {f"module.{name}": tensor for name, tensor in recorded.state_dict.items()}
    torch.save({"state_dict": state, "epoch": 300, "arch": "mapet_tiny"}, tmp_path / "checkpoint.tar")
    objective = load_upstream(
        tmp_path / "checkpoint.tar", {key: value for key, value in recorded.config.items() if key != "vocab_size"}
    )
    assert isinstance(objective, MaPeT)
    tensors = recorded.tensors
    mask = Mask.split(tensors["order"][:, 1:] - 1, objective.targets)
    output = objective(tensors["images"], tensors["token_ids"], mask)
    assert (objective.predict(tensors["images"], mask) - tensors["logits"]).abs().max() <= 1e-5
    assert (output["loss"] - tensors["loss"]).abs() <= 1e-5
    output["loss"].backward()
    names = {"mask_token": "mask_positional_token", "head.weight": "decoder.weight", "head.bias": "decoder.bias"}
    checked = set()
    for name, parameter in objective.named_parameters():
        theirs = names.get(name, name.removeprefix("backbone."))
        parts = [f"grad.{theirs.replace('qkv', part)}" for part in (("q", "kv") if "qkv" in name else ("",))]
        checked |= set(parts)
        assert (parameter.grad - torch.cat([tensors[part] for part in parts])).abs().max() <= 1e-4, name
    assert checked == {name for name in tensors if name.startswith("grad.")}


def test_finetuned_features_and_logits_equal_the_authors(oracle: Callable[..., Any], tmp_path: Path) -> None:
    recorded = oracle("finetuned")
    save_file(recorded.state_dict, tmp_path / "model.safetensors")
    images = recorded.tensors["images"]
    for source in (recorded.state_dict, tmp_path / "model.safetensors"):
        model = load_upstream(source, recorded.config).eval()
        assert (model.forward_features(images) - recorded.tensors["features"]).abs().max() <= 1e-5
        assert (model(images) - recorded.tensors["logits"]).abs().max() <= 1e-5


def test_published_shapes_need_no_config(oracle: Callable[..., Any]) -> None:
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
        for name, tensor in oracle("pretrain").state_dict.items():
            if name.startswith("blocks.0."):
                shape = tuple(192 * side // 48 for side in tensor.shape)
                shapes[name.replace("blocks.0.", f"blocks.{block}.")] = shape
    objective = load_upstream({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert isinstance(objective, MaPeT)
    assert objective.context_tokens == 50
    assert objective.backbone.blocks[0].attn.num_heads == 3
    assert objective.backbone.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("changes", "config", "says"),
    [
        ({"pos_embed": None}, {}, "holds no model of MaPeT's authors .*'pos_embed' is missing"),
        ({"blocks.0.attn.kv.weight": None}, {}, "'blocks.0.attn.kv.weight' is missing"),
        ({"blocks.0.attn.q.weight": torch.tensor(1.0)}, {}, "holds no model of MaPeT's authors"),
        ({"pos_embed": torch.zeros(1, 13, 48)}, {}, "do not fit .*'pos_embed' has shape"),
        ({"strange": torch.zeros(1)}, {}, "do not fit its architecture.*strange"),
        ({"norm.bias": None}, {}, r"do not fit its architecture.*norm\.bias"),
        ({"norm.bias": torch.full((48,), torch.nan)}, {}, "'norm.bias' in .* does not hold finite floats"),
        ({"blocks.99999.norm1.weight": torch.zeros(48)}, {}, r"do not fit .*'blocks\.3.* is missing"),
        ({"decoder.bias": torch.zeros(96)}, {}, "mask vector or head .* do not fit .*'head.* has shape"),
        ({}, {"depth": 4}, r"do not fit .*'blocks\.3.* is missing"),
        ({}, {"num_head": 3}, "timm cannot build .*num_head"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    changes: dict[str, Tensor | None], config: dict[str, Any], says: str, oracle: Callable[..., Any]
) -> None:
    state = {**oracle("pretrain").state_dict, **changes}
    with pytest.raises(MapetError, match=says):
        load_upstream(
            {name: tensor for name, tensor in state.items() if tensor is not None}, {"num_heads": 3, **config}
        )


def test_unusual_widths_need_the_number_of_heads(oracle: Callable[..., Any]) -> None:
    with pytest.raises(MapetError, match="is 48 wide, which is no multiple of the usual 64 channels a head.*num_heads"):
        load_upstream(oracle("pretrain").state_dict)
