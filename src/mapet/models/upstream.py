"""Reading the checkpoints of MaPeT's authors into timm's names.

Their files are written by ``torch.save`` and hold ``{"state_dict": ..., "epoch": ..., "arch": ...}``. Their
attention has separate ``q`` and ``kv`` projections, which are timm's ``qkv`` cut in two.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError, nearest

# What the tensors do not tell; ``init_values`` is replaced by the weights, but the authors' configurations have it.
CONFIG_KEYS = ("num_heads", "norm_eps", "global_pool", "context_tokens", "init_values")


def read_upstream(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an upstream state dict under timm's names.

    Args:
        source: a ``.tar``/``.pth`` file, a ``.safetensors`` file, or the state dict itself.

    Raises:
        MapetError: if the file is missing, cannot be read safely, or holds no ViT.
    """
    state = _read_file(Path(source)) if isinstance(source, str | Path) else dict(source)
    for key in ("state_dict", "model"):
        nested = state.get(key)
        if isinstance(nested, Mapping):
            state = dict(nested)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        raise MapetError(
            f"{_name(source)} holds no upstream MaPeT model: 'pos_embed' and 'patch_embed.proj.weight' are "
            "missing; pass a released checkpoint or its state dict"
        )
    return _join_projections(state)


def _name(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "the state dict"


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MapetError(f"checkpoint {path} does not exist; pass the path of a downloaded upstream file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MapetError(
            f"checkpoint {path} cannot be read as tensors ({reason}); it may be cut short, download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise MapetError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict")
    return dict(content)


def _join_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name, tensor in state.items():
        if ".attn.q." in name:
            kv = state[name.replace(".attn.q.", ".attn.kv.")]
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([tensor, kv])
        elif ".attn.kv." not in name:
            joined[name] = tensor
    return joined


def vit_from_upstream(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, num_classes: int = 0
) -> VisionTransformer:
    """Build the timm ViT that an upstream state dict (under timm's names) belongs to; weights not yet loaded.

    Nearly everything can be read off the tensors. ``config`` says the rest, by the keys in ``CONFIG_KEYS``; heads
    default to 64 channels each, as in all published models. What else it says must agree with the tensors.
    """
    config = dict(config or {})
    patch_size, embed_dim = state["patch_embed.proj.weight"].shape[-1], state["pos_embed"].shape[-1]
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    told = {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_classes": num_classes,
        "vocab_size": len(state.get("decoder.bias", ())),
    }
    for key, value in config.items():
        if key not in CONFIG_KEYS and key not in told:
            raise MapetError(f"unknown key {key!r} in the upstream config{nearest(key, [*CONFIG_KEYS, *told])}")
        if value != told.get(key, value):
            raise MapetError(f"the upstream config says {key} is {value}, but the checkpoint's is {told[key]}")
    return VisionTransformer(
        img_size=told["img_size"],
        patch_size=patch_size,
        in_chans=state["patch_embed.proj.weight"].shape[1],
        embed_dim=embed_dim,
        depth=told["depth"],
        num_heads=config.get("num_heads", max(1, embed_dim // 64)),
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        norm_layer=lambda dim, **kwargs: nn.LayerNorm(dim, eps=config.get("norm_eps", 1e-6), **kwargs),
        num_classes=num_classes,
        global_pool=config.get("global_pool", "avg" if "fc_norm.weight" in state else "token"),
    )
