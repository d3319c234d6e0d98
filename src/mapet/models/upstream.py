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

CONFIG_KEYS = (
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "init_values", "norm_eps",
    "vocab_size", "context_tokens", "num_classes", "global_pool",
)  # fmt: skip


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

    Everything but the number of heads can be read off the tensors; heads default to 64 channels each, as in
    all published models. ``config`` overrides, by the keys in ``CONFIG_KEYS``.
    """
    config = dict(config or {})
    for key in config:
        if key not in CONFIG_KEYS:
            raise MapetError(f"unknown key {key!r} in the upstream config{nearest(key, CONFIG_KEYS)}")
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    embed_dim = state["pos_embed"].shape[-1]
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    pool = config.get("global_pool", "avg" if "fc_norm.weight" in state else "token")
    return VisionTransformer(
        img_size=config.get("img_size", side * patch_size),
        patch_size=config.get("patch_size", patch_size),
        in_chans=state["patch_embed.proj.weight"].shape[1],
        embed_dim=config.get("embed_dim", embed_dim),
        depth=config.get("depth", depth),
        num_heads=config.get("num_heads", max(1, embed_dim // 64)),
        init_values=config.get("init_values", 0.1 if "blocks.0.ls1.gamma" in state else None),
        norm_layer=lambda dim, **kwargs: nn.LayerNorm(dim, eps=config.get("norm_eps", 1e-6), **kwargs),
        num_classes=num_classes,
        global_pool=pool,
    )
