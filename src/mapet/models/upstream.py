"""Checkpoints of MaPeT's authors, read into timm's tensor names.

Their files are written by ``torch.save`` and hold ``{"state_dict": ..., "epoch": ..., "arch": ...}``. Their attention
has separate ``q`` and ``kv`` projections; stacked, they are timm's ``qkv``.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.models.tensors import FLOATS, State, check_fit, flatten_state, read_tensors

# Tensors that only pre-training needs: the authors' names and the objectives' names.
PRETRAINING_NAMES = {
    "mask_positional_token": "mask_token",
    "decoder.weight": "head.weight",
    "decoder.bias": "head.bias",
}
# Published sizes: (width, depth) to the size in timm's model names.
SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base"}


def load_backbone(
    source: str | Path | State, overrides: Mapping[str, Any]
) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """Load the network of a checkpoint of MaPeT's authors.

    Args:
        source: a ``.tar``, ``.pth`` or ``.safetensors`` file, or the state dict itself.
        overrides: arguments of ``timm.create_model`` that take the place of those read from the tensors. Tensors do not
            tell ``num_heads``; by default heads have 64 channels each, as in all published models.

    Returns:
        The timm network, and the mask vector and head under the objectives' names; a fine-tuned classifier has none.

    Raises:
        MapetError: if the file is missing, cannot be read safely or holds no Vision Transformer; if its tensors are not
            finite floats or do not fit the network; if timm cannot build the network.
    """
    name = str(source) if isinstance(source, str | Path) else "the state dict"
    state = _read_state(source, name)
    try:
        weights = _join_projections(state)
        is_pretraining = any(theirs in weights for theirs in PRETRAINING_NAMES)
        parts = {ours: weights.pop(theirs) for theirs, ours in PRETRAINING_NAMES.items()} if is_pretraining else {}
        arguments = _read_architecture(weights)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise MapetError(
            f"{name} holds no model of MaPeT's authors ({reason}); pass one of their checkpoints"
        ) from error
    width = arguments["embed_dim"]
    if width % 64 and "num_heads" not in overrides:
        raise MapetError(
            f"{name} is {width} wide, which is no multiple of the usual 64 channels a head; pass the number of "
            "attention heads as num_heads (--num-heads)"
        )
    size = SIZES.get((width, arguments["depth"]), "base")
    try:
        network: VisionTransformer = timm.create_model(f"vit_{size}_patch16_224", **arguments | dict(overrides))
    except (TypeError, AssertionError, ValueError, RuntimeError, ArithmeticError) as error:
        raise MapetError(f"timm cannot build the network of {name}: {error}") from error
    load_weights(network, weights, name)
    return network, parts


def _read_state(source: str | Path | State, name: str) -> dict[str, Tensor]:
    state = read_tensors(Path(source)) if isinstance(source, str | Path) else flatten_state(source, name)
    broken = [key for key, value in state.items() if value.dtype not in FLOATS or not value.isfinite().all()]
    if broken:
        raise MapetError(f"tensor {broken[0]!r} in {name} does not hold finite floats; take another checkpoint")
    return state


def _join_projections(state: State) -> dict[str, Tensor]:
    """Return the state dict with each pair of ``q`` and ``kv`` joined to timm's ``qkv``."""
    joined = dict(state)
    for name in state:
        if ".attn.q." in name:
            query, key_value = joined.pop(name), joined.pop(name.replace(".attn.q.", ".attn.kv."))
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([query, key_value])
    return joined


def _read_architecture(weights: State) -> dict[str, Any]:
    """Return those arguments of ``timm.create_model`` that the shapes and names of tensors tell."""
    width, channels, _, patch_size = weights["patch_embed.proj.weight"].shape
    _, tokens, _ = weights["pos_embed"].shape  # one of them is the class token
    hidden, _ = weights["blocks.0.mlp.fc1.weight"].shape
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    has_fc_norm = "fc_norm.weight" in weights
    return {
        "img_size": math.isqrt(tokens - 1) * patch_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "num_heads": width // 64,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "mlp_ratio": hidden / width,
        "num_classes": classes,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,  # replaced by the weights
        "fc_norm": has_fc_norm,
        # Classifiers without fc_norm read the class token; a pre-trained network gives the mean of its patches.
        "global_pool": "token" if classes and not has_fc_norm else "avg",
    }


def load_weights(module: nn.Module, state: State, name: str) -> None:
    """Load a state dict that must have exactly the tensors of the module; ``name`` is the file's, for the message.

    Raises:
        MapetError: naming a tensor that is missing, unknown or of another shape.
    """
    check_fit(state, module.state_dict(), name, "its architecture", prefixes=("",))
    module.load_state_dict(state)
