"""Reading the checkpoints of BEiT (2106.08254), BEiT v2 (2208.06366) and MAE (2111.06377) into timm's names.

Most of their names are timm's already, for timm's models descend from theirs. What is not a part of the network that
remains after pre-training (decoders, mask vectors, heads that predict ids) is left out and named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mapet.errors import MapetError
from mapet.models.published import Blueprint, name_architecture, read_sizes, square_side, tensor_of, vit_blueprint

# ``relative_position_index`` is a buffer that timm computes. BEiT v2 pre-trains with two more blocks over the class
# token (``cls_pt_layers``), which may have a norm and a head of their own.
BEIT_LEFT_OUT = re.compile(r"(.*\.)?relative_position_index|mask_token|lm_head\..*|cls_pt_.*")
MAE_LEFT_OUT = re.compile(r"mask_token|decoder_.*")


def recognise(state: Mapping[str, Tensor]) -> str | None:
    """Return whose file this looks like: upstream, beit, beitv2 or mae; None for anybody else's."""
    if "blocks.0.attn.kv.weight" in state or "mask_positional_token" in state:
        return "upstream"
    if any(name.startswith("cls_pt_layers.") for name in state):
        return "beitv2"
    if "blocks.0.attn.q_bias" in state or any(name.endswith("relative_position_bias_table") for name in state):
        return "beit"
    return "mae" if {"blocks.0.attn.qkv.weight", "pos_embed", "cls_token"} <= set(state) else None


def beit_blueprint(state: Mapping[str, Tensor], heads: int | None = None, family: str = "beit") -> Blueprint:
    """Say which timm network a BEiT or BEiT v2 file is for, fine-tuned or pre-trained.

    The relative position bias may be each block's own, as after fine-tuning, or shared, as in pre-training: timm has
    both. The number of heads is the width of its table.

    Args:
        state: the file's tensors.
        heads: attention heads, where there is no such table; None for 64 channels each.
        family: ``beit`` or ``beitv2``.

    Raises:
        MapetError: if sizes cannot be told, or contradict each other.
    """
    own, shared = "blocks.0.attn.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"
    weights, left_out = _split(state, BEIT_LEFT_OUT)
    if own in state or shared in state:
        table = tensor_of(state, own if own in state else shared, 2)
        if heads not in (None, table.shape[1]):
            raise MapetError(f"num_heads is {heads}, but the checkpoint's position bias is for {table.shape[1]} heads")
        heads = table.shape[1]
        # (2 side - 1)^2 offsets between patches, and three to, from and within the class token.
        side = (square_side(len(table) - 3, "the relative position bias") + 1) // 2
    elif "pos_embed" in state:
        side = square_side(tensor_of(state, "pos_embed", 3).shape[1] - 1, "the position embedding")
    else:
        raise MapetError(
            "the checkpoint has neither position embedding nor position bias, so its input size is unknown"
        )
    arguments = read_sizes(state, side, heads) | {
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "init_values": 1.0 if "blocks.0.gamma_1" in state else None,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_rel_pos_bias": own in state,
        "use_shared_rel_pos_bias": shared in state,
        "use_fc_norm": "fc_norm.weight" in state,
    }
    return Blueprint(name_architecture(family, arguments), arguments, weights, left_out)


def beitv2_blueprint(state: Mapping[str, Tensor], heads: int | None = None) -> Blueprint:
    """Say which timm network a BEiT v2 file is for; see ``beit_blueprint``."""
    return beit_blueprint(state, heads, "beitv2")


def mae_blueprint(state: Mapping[str, Tensor], heads: int | None = None) -> Blueprint:
    """Say which timm network an MAE file is for: pre-trained, with or without its decoder, or fine-tuned.

    Raises:
        MapetError: if sizes cannot be told, or contradict each other.
    """
    weights, left_out = _split(state, MAE_LEFT_OUT)
    return replace(vit_blueprint(weights, heads), left_out=left_out)


def _split(state: Mapping[str, Tensor], left_out: re.Pattern[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    weights = {name: tensor for name, tensor in state.items() if not left_out.fullmatch(name)}
    return weights, tuple(name for name in state if name not in weights)
