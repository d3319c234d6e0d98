"""timm's attention and block with rectangular masks; parameters and state-dict keys stay timm's.

The shape of the mask tells which rows are computed: with an ``(R, K)`` mask the *last* ``R`` rows are the queries and
the *first* ``K`` rows the keys. Without a mask the computation is timm's.
"""

from functools import cache

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from mapet.errors import MapetError


@cache
def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for matrix products in bfloat16 (AVX512-bf16 or AMX)."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """Return scaled dot-product attention, computed in the form that is faster on the device and for the type.

    Args:
        query: ``(B, heads, R, d)``.
        key: ``(B, heads, K, d)``; ``value`` likewise.
        mask: ``(R, K)`` boolean, true where a row may attend to a key.
        dropout: probability of dropping an attention weight.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and cpu_has_bfloat16():
        # Measured with benchmarks/attention.py, 8 images x 3 heads, 491 rows, 344 keys, 64 wide, forward + backward:
        # on 2 cores with AVX512-bf16 the fused kernel gains nothing from bfloat16 and the matrix products below run
        # about 2.4 times faster than it; on a CPU with AVX2 alone they run 2.5 times slower.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return F.dropout(weights, dropout) @ value if dropout else weights @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


class LayoutAttention(Attention):  # type: ignore[misc]
    """timm's ``Attention`` with rectangular masks: the last ``R`` rows attend to the first ``K`` rows."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, R, D)``; without a mask, R is N and the computation is timm's."""
        if attn_mask is None:
            return super().forward(x, is_causal=is_causal)  # type: ignore[no-any-return]
        rows, keys = attn_mask.shape
        x_rows = x[:, -rows:]
        # Rows and keys are projected separately: a row that is never a key needs no key and no value.
        q_weight, kv_weight = self.qkv.weight.tensor_split([self.attn_dim])
        q_bias, kv_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.tensor_split([self.attn_dim])
        q = F.linear(x_rows, q_weight, q_bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        kv = F.linear(x[:, :keys], kv_weight, kv_bias).unflatten(-1, (2, self.num_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        out = attend(q, k, v, attn_mask, self.attn_drop.p if self.training else 0.0)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x_rows).sigmoid()
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class LayoutBlock(Block):  # type: ignore[misc]
    """timm's ``Block`` that returns only the rows of its mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, R, D)``, with R the rows of the mask."""
        if attn_mask is None:
            return super().forward(x, is_causal=is_causal)  # type: ignore[no-any-return]
        rows = x[:, -attn_mask.shape[0] :]
        rows = rows + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return rows + self.drop_path2(self.ls2(self.mlp(self.norm2(rows))))  # type: ignore[no-any-return]


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
