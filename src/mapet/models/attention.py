"""timm's attention and block with rectangular masks; parameters and state-dict keys stay timm's.

A ``Layout`` says which rows are computed and what they see. Without one the computation is timm's.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mapet.errors import MapetError

_CAPABILITIES: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
# Whether the CPU has instructions for matrix products in bfloat16.
CPU_HAS_BFLOAT16 = bool(_CAPABILITIES.get("avx512_bf16") or _CAPABILITIES.get("amx_bf16"))

# Numbers in the rows of a batch from which on they are computed again instead of kept: ``checkpoint`` itself takes a
# third of a millisecond, which is much of a small step (measured: a third more time for the steps of ``mapet demo``).
LEAST_WITHOUT_KEEPING = 2**19


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

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | Layout | None = None,
        is_causal: bool = False,
        layer_scale: nn.Module | None = None,
    ) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, R, D)``; without a layout, R is N and the computation is timm's."""
        if not isinstance(attn_mask, Layout):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[no-any-return]
        x_rows, x_keys = last_rows(x, attn_mask.rows), x if attn_mask.keys == x.shape[1] else x[:, : attn_mask.keys]
        if x_rows is x_keys:
            q, k, v = self._heads(self.qkv(x), 3)
        else:  # a row that is never a key needs no key and no value
            q_weight, kv_weight = self.qkv.weight.tensor_split([self.attn_dim])
            q_bias, kv_bias = (None, None) if self.qkv.bias is None else self.qkv.bias.tensor_split([self.attn_dim])
            (q,) = self._heads(F.linear(x_rows, q_weight, q_bias), 1)
            k, v = self._heads(F.linear(x_keys, kv_weight, kv_bias), 2)
        q, k = self.q_norm(q), self.k_norm(k)
        out = attend(q, k, v, attn_mask.mask, self.attn_drop.p if self.training else 0.0)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x_rows).sigmoid()
        return self.proj_drop(F.linear(out, *scaled(self.proj, layer_scale)))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split ``(B, N, parts * D)`` into so many tensors ``(B, heads, N, d)``."""
        return x.unflatten(-1, (parts, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]


class LayoutMlp(Mlp):  # type: ignore[misc]
    """timm's ``Mlp``, also with the normalisation before it and the LayerScale behind it.

    Only the input and the hidden rows before the activation are kept for the backward pass.
    """

    def forward(self, x: Tensor, norm: nn.Module | None = None, layer_scale: nn.Module | None = None) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, N, D)``."""
        weight, bias = scaled(self.fc2, layer_scale)

        def first(x: Tensor) -> Tensor:
            return self.fc1(x if norm is None else norm(x))  # type: ignore[no-any-return]

        def second(hidden: Tensor) -> Tensor:
            return F.linear(self.norm(self.drop1(self.act(hidden))), weight, bias)

        return self.drop2(without_keeping(second, without_keeping(first, x), random=self.drop1.p > 0))  # type: ignore[no-any-return]


def without_keeping(function: Callable[[Tensor], Tensor], x: Tensor, random: bool = False) -> Tensor:
    """Return ``function(x)``; what it computes before its last product is computed again in the backward pass.

    The last product is not: ``checkpoint`` stops when it has what the backward pass needs. So normalisation and
    activation before a product cost their own time alone, and nothing but ``x`` is kept.

    Args:
        function: ends with a product.
        x: its input.
        random: whether it draws random numbers.
    """
    if not torch.is_grad_enabled() or x.numel() < LEAST_WITHOUT_KEEPING:
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=random)


class LayoutBlock(Block):  # type: ignore[misc]
    """timm's ``Block`` that computes only the rows of a ``Layout``."""

    def forward(self, x: Tensor, attn_mask: Tensor | Layout | None = None, is_causal: bool = False) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, R, D)``; without a layout, R is N and the computation is timm's."""
        if not isinstance(attn_mask, Layout):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[no-any-return]
        attended = self.attn(self.norm1(x), attn_mask, layer_scale=self.ls1)
        x = add_branch(last_rows(x, attn_mask.rows), attended, self.drop_path1)
        if isinstance(self.mlp, LayoutMlp):
            branch = self.mlp(x, self.norm2, self.ls2)
        else:
            branch = self.ls2(self.mlp(self.norm2(x)))
        return add_branch(x, branch, self.drop_path2)


def last_rows(x: Tensor, rows: int) -> Tensor:
    """Return the last rows of ``(B, N, D)``."""
    # A slice of all rows would copy the gradient in its backward pass.
    return x if rows == x.shape[1] else x[:, -rows:]


def scaled(linear: nn.Linear, layer_scale: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear layer followed by LayerScale.

    The weight is scaled instead of the rows, so that no rows are kept for the gradient of the scale.
    """
    if not isinstance(layer_scale, LayerScale):
        return linear.weight, linear.bias
    gamma = layer_scale.gamma
    return linear.weight * gamma[:, None], None if linear.bias is None else linear.bias * gamma


def add_branch(x: Tensor, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """Return ``x + drop_path(branch)`` in one pass over the rows."""
    if not isinstance(drop_path, DropPath) or not drop_path.training:
        return x + branch
    return torch.addcmul(x, branch, drop_path(x.new_ones(len(x), 1, 1)))


def make_blocks(depth: int, width: int, heads: int, **options: Any) -> nn.Sequential:
    """Return blocks for a decoder; ``options`` are timm's."""
    options |= {"qkv_bias": True, "attn_layer": LayoutAttention, "mlp_layer": LayoutMlp}
    return nn.Sequential(*[LayoutBlock(width, heads, **options) for _ in range(depth)])


def apply_blocks(blocks: Iterable[nn.Module], x: Tensor, rows: int | None = None) -> Tensor:
    """Map ``(B, N, D)`` through blocks in which all rows see each other.

    Args:
        blocks: at least one ``LayoutBlock``.
        x: the rows.
        rows: how many are wanted, the last ones; None: all. The last block computes no others.
    """
    layout = Layout(x.shape[1], x.shape[1])
    *first, last = blocks
    for block in first:
        x = block(x, layout)
    return last(x, layout.last(rows or x.shape[1]))  # type: ignore[no-any-return]


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
        if type(block.mlp) is Mlp:
            block.mlp.__class__ = LayoutMlp
    return backbone
