"""Reading the checkpoints of MaPeT's authors into timm's names.

Their files are written by ``torch.save`` and hold ``{"state_dict": ..., "epoch": ..., "arch": ...}``. Their
attention has separate ``q`` and ``kv`` projections, which are timm's ``qkv`` cut in two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError, nearest
from mapet.models.published import Blueprint, check_pretraining, vit_blueprint
from mapet.models.tensors import flatten_state, read_tensors

# Their names of what pre-training alone needs, and the objectives'.
PRETRAINING_NAMES = {
    "mask_positional_token": "mask_token",
    "decoder.weight": "head.weight",
    "decoder.bias": "head.bias",
}

# What the tensors tell, and what they do not; ``init_values`` is replaced by the weights, but the authors have it.
TOLD = ("img_size", "patch_size", "embed_dim", "depth", "num_classes")
CONFIG_KEYS = ("num_heads", "norm_eps", "global_pool", "context_tokens", "init_values")


def read_upstream(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an upstream state dict under timm's names.

    Args:
        source: a ``.tar``/``.pth`` file, a ``.safetensors`` file, or the state dict itself.

    Raises:
        MapetError: if the file is missing, cannot be read safely, or holds no ViT.
    """
    state, _ = read_tensors(Path(source)) if isinstance(source, str | Path) else flatten_state(source)
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        raise MapetError(
            f"{_name(source)} holds no upstream MaPeT model: 'pos_embed' and 'patch_embed.proj.weight' are "
            "missing; pass a released checkpoint or its state dict"
        )
    return join_projections(state)


def _name(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "the state dict"


def join_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an upstream state dict with each ``q`` and ``kv`` as timm's one ``qkv``."""
    joined = {}
    for name, tensor in state.items():
        if ".attn.q." in name:
            kv = state.get(name.replace(".attn.q.", ".attn.kv."))
            if kv is None or not kv.ndim or kv.ndim != tensor.ndim or kv.shape[1:] != tensor.shape[1:]:
                raise MapetError(f"the upstream checkpoint has {name!r}, but no 'kv' projection that goes with it")
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([tensor, kv])
        elif ".attn.kv." not in name or name.replace(".attn.kv.", ".attn.q.") not in state:
            joined[name] = tensor
    return joined


def upstream_blueprint(state: Mapping[str, Tensor], heads: int | None = None) -> Blueprint:
    """Say which timm network a file of the authors is for: pre-trained, or a fine-tuned classifier.

    Args:
        state: the file's tensors, under the authors' names or timm's.
        heads: attention heads; None for 64 channels each, as in all published models.

    Raises:
        MapetError: if sizes cannot be told, or contradict each other.
    """
    joined = join_projections(state)
    pretraining = {ours: joined.pop(theirs) for theirs, ours in PRETRAINING_NAMES.items() if theirs in joined}
    blueprint = vit_blueprint(joined, heads)
    if pretraining:
        check_pretraining(pretraining, blueprint.arguments["embed_dim"])
    return replace(blueprint, weights=joined, pretraining=pretraining)


def vit_from_upstream(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VisionTransformer:
    """Build the timm ViT that an upstream state dict (under timm's names) belongs to; weights not yet loaded.

    Nearly everything can be read off the tensors. ``config`` says the rest, by the keys in ``CONFIG_KEYS``; heads
    default to 64 channels each, as in all published models. What else it says must agree with the tensors.
    """
    config = dict(config or {})
    known = (*CONFIG_KEYS, *TOLD, "vocab_size")
    for key in config:
        if key not in known:
            raise MapetError(f"unknown key {key!r} in the upstream config{nearest(key, known)}")
    blueprint = upstream_blueprint(state, config.get("num_heads"))
    told = {key: blueprint.arguments[key] for key in TOLD}
    told["vocab_size"] = len(blueprint.pretraining.get("head.bias", ()))
    for key, value in config.items():
        if value != told.get(key, value):
            raise MapetError(f"the upstream config says {key} is {value}, but the checkpoint's is {told[key]}")
    arguments = blueprint.arguments | {
        "global_pool": config.get("global_pool", blueprint.arguments["global_pool"]),
        "norm_layer": partial(nn.LayerNorm, eps=config.get("norm_eps", 1e-6)),
    }
    vit: VisionTransformer = timm.create_model(blueprint.architecture, **arguments)
    return vit

PRETRAINING_FILE = "pretraining.safetensors"
