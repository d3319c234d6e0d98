"""timm's attention and block with rectangular masks; parameters and state-dict keys stay timm's.

A ``Layout`` says which rows are computed and what they see. Without one the computation is timm's.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError

_CAPABILITIES: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
# Whether the CPU has instructions for matrix products in bfloat16.
CPU_HAS_BFLOAT16 = bool(_CAPABILITIES.get("avx512_bf16") or _CAPABILITIES.get("amx_bf16"))


class Layout(NamedTuple):
    """Which rows a block computes, and what they see.

    Attributes:
        rows: ``R``; the last ``R`` rows are computed.
        keys: ``K``; they may attend to the first ``K`` rows.
        mask: ``(R, K)``, see ``additive_mask``; None: they attend to all of these.
    """

    rows: int
    keys: int
    mask: Tensor | None = None

    def last(self, rows: int) -> Self:
        """Return the layout of the last of its rows alone."""
        return self._replace(rows=rows, mask=None if self.mask is None else self.mask[-rows:])


def product_type(x: Tensor) -> torch.dtype:
    """Return the type that products with ``x`` are computed in: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores: 0, or -inf where a row may not attend.

    Made once for all blocks: a boolean mask is converted in each of them, and kept by each for the backward pass.

    Args:
        visible: ``(R, K)`` boolean, true where a row may attend to a key.
        dtype: that attention is computed in.
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Return scaled dot-product attention, computed in the form that is faster on the device and for the type.

    Args:
        query: ``(B, heads, R, d)``.
        key: ``(B, heads, K, d)``; ``value`` likewise.
        mask: ``(R, K)``, see ``additive_mask``; None: every row attends to every key.
        dropout: probability of dropping an attention weight.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and CPU_HAS_BFLOAT16:
        # Measured with benchmarks/attention.py, 8 images x 3 heads, 491 rows, 344 keys, 64 wide, forward + backward:
        # on 2 cores with AVX512-bf16 the fused kernel gains nothing from bfloat16 and the matrix products below run
        # about 2.4 times faster than it; on a CPU with AVX2 alone they run 2.5 times slower.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        return F.dropout(weights, dropout) @ value if dropout else weights @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


class LayoutAttention(Attention):  # type: ignore[misc]
    """timm's ``Attention``, also of a ``Layout``."""

    def forward(self, x: Tensor, attn_mask: Tensor | Layout | None = None, is_causal: bool = False) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, R, D)``; without a layout, R is N and the computation is timm's."""
        if not isinstance(attn_mask, Layout):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[no-any-return]
        x_rows, x_keys = last_rows(x, attn_mask.rows), x if attn_mask.keys == x.shape[1] else x[:, : attn_mask.keys]
        # Rows and keys are projected separately: a row that is never a key needs no key and no value.
        q_weight, kv_weight = self.qkv.weight.tensor_split([self.attn_dim])
        q_bias, kv_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.tensor_split([self.attn_dim])
        q = F.linear(x_rows, q_weight, q_bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        kv = F.linear(x_keys, kv_weight, kv_bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        out = attend(q, k, v, attn_mask.mask, self.attn_drop.p if self.training else 0.0)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x_rows).sigmoid()
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class LayoutBlock(Block):  # type: ignore[misc]
    """timm's ``Block`` that computes only the rows of a ``Layout``."""

    def forward(self, x: Tensor, attn_mask: Tensor | Layout | None = None, is_causal: bool = False) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, R, D)``; without a layout, R is N and the computation is timm's."""
        if not isinstance(attn_mask, Layout):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[no-any-return]
        attended = self.attn(self.norm1(x), attn_mask)
        x = add_scaled(last_rows(x, attn_mask.rows), attended, self.ls1, self.drop_path1)
        return add_scaled(x, self.mlp(self.norm2(x)), self.ls2, self.drop_path2)


def last_rows(x: Tensor, rows: int) -> Tensor:
    """Return the last rows of ``(B, N, D)``."""
    # A slice of all rows would copy the gradient in its backward pass.
    return x if rows == x.shape[1] else x[:, -rows:]


def add_scaled(x: Tensor, branch: Tensor, layer_scale: nn.Module, drop_path: nn.Module) -> Tensor:
    """Return ``x + drop_path(layer_scale(branch))``, with LayerScale in one pass over the rows."""
    if not isinstance(layer_scale, LayerScale):
        return x + drop_path(branch)  # type: ignore[no-any-return]
    # Stochastic depth multiplies all rows of an image by the same number, so it can multiply the scale instead.
    return torch.addcmul(x, branch, drop_path(x.new_ones(len(x), 1, 1)) * layer_scale.gamma)


def use_layouts(backbone: VisionTransformer) -> VisionTransformer:
    """Let the blocks of a timm ViT take rectangular masks, in place.

    Only the classes of the blocks and of their attention change. Parameters, hooks, state-dict keys and the result of
    an ordinary forward pass stay the same.

    Raises:
        MapetError: for a backbone that is not a plain timm ViT with learned position embeddings.
    """
    if not isinstance(backbone, VisionTransformer):
        raise MapetError(
            f"the backbone is a {type(backbone).__name__}; the objectives need a plain timm "
            "VisionTransformer such as 'vit_small_patch16_224'"
        )
    patch = backbone.patch_embed
    if type(patch) is not PatchEmbed or patch.proj.kernel_size != patch.proj.stride:
        raise MapetError(
            f"the backbone embeds patches by a {type(patch).__name__} whose patches overlap, so that a target's pixels "
            "would be seen before it is predicted; choose a ViT with plain patches such as 'vit_small_patch16_224'"
        )
    if backbone.pos_embed is None or backbone.dynamic_img_size:
        raise MapetError(
            "the backbone has no learned position embedding of one fixed image size; build it with pos_embed='learn' "
            "and without dynamic_img_size"
        )
    for index, block in enumerate(backbone.blocks):
        attention = getattr(block, "attn", None)
        if type(block) not in (Block, LayoutBlock) or type(attention) not in (Attention, LayoutAttention):
            raise MapetError(
                f"block {index} of the backbone is a {type(block).__name__} with {type(attention).__name__}; "
                "the objectives need timm's standard Block and Attention: choose another model"
            )
    for block in backbone.blocks:
        block.__class__ = LayoutBlock
        block.attn.__class__ = LayoutAttention
    return backbone
