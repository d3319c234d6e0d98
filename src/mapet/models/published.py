"""What the tensors of files that others published say of their network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import Tensor

from mapet.errors import MapetError

# Of a width of 64 channels a head, as all published ones but ViT-Huge have it.
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
HEADS = {1280: 16}


@dataclass(frozen=True)
class Blueprint:
    """A timm network that is to be built, and its weights.

    Attributes:
        architecture: timm's name for it.
        arguments: of ``timm.create_model``; numbers and words only, so that an export can repeat them.
        weights: under timm's names.
        left_out: tensors that the network has no place for and that are known for what they are.
        pretraining: mask vector and head of a pre-training checkpoint, under the objectives' names.
    """

    architecture: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    left_out: tuple[str, ...] = ()
    pretraining: dict[str, Tensor] = field(default_factory=dict)


def tensor_of(state: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    """Return a tensor that sizes are read off.

    Raises:
        MapetError: if it is missing, or has another number of dimensions.
    """
    if name not in state:
        raise MapetError(f"the checkpoint lacks {name!r}, so it holds no such network")
    if state[name].ndim != dimensions or not state[name].numel():
        raise MapetError(f"{name!r} has shape {tuple(state[name].shape)}, but {dimensions} dimensions are expected")
    return state[name]


def count_blocks(weights: Mapping[str, Tensor]) -> int:
    """Return how many ``blocks.N`` there are.

    Raises:
        MapetError: if some are left out.
    """
    numbers = {int(number[1]) for name in weights if (number := re.match(r"blocks\.(\d+)\.", name))}
    lacking = next((number for number in range(len(numbers)) if number not in numbers), None)
    if lacking is not None:
        raise MapetError(f"the checkpoint has 'blocks.{max(numbers)}', but no 'blocks.{lacking}'")
    return len(numbers)


def check_pretraining(parts: Mapping[str, Tensor], width: int) -> None:
    """Refuse a mask vector and a head, under the objectives' names, that are not for tokens of this width.

    Raises:
        MapetError: naming the tensor that is missing, or of another shape.
    """
    ids = len(tensor_of(parts, "head.weight", 2))
    for name, shape in (("mask_token", (1, 1, width)), ("head.weight", (ids, width)), ("head.bias", (ids,))):
        if tensor_of(parts, name, len(shape)).shape != shape:
            raise MapetError(f"{name!r} has shape {tuple(parts[name].shape)} instead of {shape}")


def name_architecture(family: str, arguments: Mapping[str, Any]) -> str:
    """Return the timm model of a family (``vit``, ``beit``, ``beitv2``) of this size, or else its base model."""
    size = SIZES.get((arguments["embed_dim"], arguments["depth"]), "base")
    name = f"{family}_{size}_patch{14 if size == 'huge' else 16}_224"
    return name if timm.is_model(name) else f"{family}_base_patch16_224"


def settle_heads(width: int, asked: int | None) -> int:
    """Return the number of attention heads, which the tensors do not tell.

    Raises:
        MapetError: if it must be said, or does not divide the width.
    """
    heads = asked or HEADS.get(width) or (width // 64 if width % 64 == 0 else None)
    if heads is None:
        raise MapetError(
            f"the checkpoint is {width} wide, which is no multiple of the usual 64 channels a head, and its tensors do "
            "not tell the number of attention heads; pass --num-heads"
        )
    if width % heads:
        raise MapetError(f"num_heads is {heads}, which does not divide the checkpoint's width of {width}")
    return heads


def square_side(patches: int, what: str) -> int:
    """Return the side of a square grid of patches.

    Raises:
        MapetError: if it is none.
    """
    side = math.isqrt(patches)
    if side < 1 or side * side != patches:
        raise MapetError(f"{what} is for {patches} patches, which is no square grid; only square inputs are converted")
    return side


def read_sizes(state: Mapping[str, Tensor], side: int, heads: int | None) -> dict[str, Any]:
    """Return those arguments of ``timm.create_model`` that ViTs and BEiTs have in common.

    Args:
        state: tensors under timm's names.
        side: of the grid of patches.
        heads: attention heads; None for 64 channels each.
    """
    embedding = tensor_of(state, "patch_embed.proj.weight", 4)
    width, channels, _, patch = embedding.shape
    classes = len(tensor_of(state, "head.weight", 2)) if "head.weight" in state else 0
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": count_blocks(state),
        "num_heads": settle_heads(width, heads),
        "mlp_ratio": len(tensor_of(state, "blocks.0.mlp.fc1.weight", 2)) / width,
        "num_classes": classes,
        # Without fc_norm, classifiers read the class token; a pre-trained network gives the mean of its patches.
        "global_pool": "token" if classes and "fc_norm.weight" not in state else "avg",
    }


def vit_blueprint(weights: Mapping[str, Tensor], heads: int | None = None) -> Blueprint:
    """Say which plain timm ViT tensors under timm's names are for.

    Args:
        weights: of the network.
        heads: attention heads; None for 64 channels each.

    Raises:
        MapetError: if sizes cannot be told, or contradict each other.
    """
    side = square_side(tensor_of(weights, "pos_embed", 3).shape[1] - 1, "the position embedding")
    arguments = read_sizes(weights, side, heads) | {
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "fc_norm": "fc_norm.weight" in weights,
    }
    return Blueprint(name_architecture("vit", arguments), arguments, dict(weights))
