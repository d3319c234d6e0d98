"""CAE: context autoencoder (Chen et al., 2202.03026)."""

from __future__ import annotations

from functools import partial
from typing import TypedDict

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.objectives.base import Objective, check_counts, mask_vector, token_head
from mapet.objectives.patches import gather_rows, sincos_positions

LAYER_SCALE = 0.1  # of regressor and decoder, as published
norm = partial(nn.LayerNorm, eps=1e-6)


class CAEOutput(TypedDict):
    """Scalar ``loss``, ``cross_entropy``, ``alignment`` and ``accuracy``; ``logits`` ``(B, T, V)``."""

    loss: Tensor
    cross_entropy: Tensor
    alignment: Tensor
    accuracy: Tensor
    logits: Tensor


class CAE(Objective):
    """Predict the representations of masked patches from the visible ones', and from those their visual token ids.

    Section 3.1 of the paper:

    - *Encoder*: the ViT on visible patches only, whose representations are ``Z_v``.
    - *Latent contextual regressor*: cross-attention from mask queries to ``Z_v`` and to themselves gives ``Z_m``; it
      leaves ``Z_v`` as it is.
    - *Alignment*: ``Z_m`` is to be what the same encoder, without a gradient, makes of the masked patches alone.
    - *Decoder*: self-attention over ``Z_m``, and a linear layer, give the ids.
    - *Loss*: cross-entropy of the ids of masked patches, and ``alignment_weight`` times the mean squared error of the
      alignment.

    Masks are BEiT's blocks, over half of the patches. Layers are those of the authors' code: queries and keys get
    fixed sine-cosine positions, the regressor sees no class token, the residual around its MLP begins after the norm.
    It departs from that code in that:

    - positions in the encoder are learned, and its initial weights are timm's, as every objective's;
    - regressor and decoder are as wide as the encoder and have no stochastic depth;
    - with register tokens, they go into both passes of the encoder as the class token does.

    Args:
        backbone: a timm ``VisionTransformer``. It is used, not copied.
        vocab_size: ``V``, the number of visual token ids.
        context_tokens: ``c``, class token and visible patches.
        order: how patches are chosen.
        regressor_depth: cross-attention blocks.
        decoder_depth: self-attention blocks.
        alignment_weight: of the alignment.
    """

    default_order = "blockwise"
    target_share = 98 / 196
    needs_ids = True
    cross_entropy = "cross_entropy"

    positions: Tensor

    def __init__(
        self,
        backbone: VisionTransformer,
        vocab_size: int,
        context_tokens: int | None = None,
        order: str | None = None,
        *,
        regressor_depth: int = 4,
        decoder_depth: int = 4,
        alignment_weight: float = 2.0,
    ) -> None:
        super().__init__(backbone, context_tokens, order)
        check_counts(regressor_depth=regressor_depth, decoder_depth=decoder_depth)
        if isinstance(alignment_weight, bool | str) or not 0 <= alignment_weight < float("inf"):
            raise MapetError(f"objective argument alignment_weight is {alignment_weight!r}; it must be a number from 0")
        if self.context_tokens == self.prefix:
            raise MapetError(
                f"context_tokens is {self.context_tokens}, so no patch is visible to regress from; take at least "
                f"{self.prefix + 1}"
            )
        self.vocab_size, self.alignment_weight = vocab_size, alignment_weight
        width, heads = backbone.embed_dim, backbone.blocks[0].attn.num_heads
        self.mask_token = mask_vector(width)
        self.regressor = nn.ModuleList([RegressorBlock(width, heads) for _ in range(regressor_depth)])
        self.regressor_norm = norm(width)
        self.decoder = nn.Sequential(
            *[
                Block(width, heads, qkv_bias=True, init_values=LAYER_SCALE, norm_layer=norm)
                for _ in range(decoder_depth)
            ]
        )
        self.decoder_norm = norm(width)
        for module in (*self.regressor.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.head = token_head(width, vocab_size)
        self.register_buffer("positions", sincos_positions(self.grid, width), persistent=False)

    def forward(self, images: Tensor, token_ids: Tensor, order: Tensor | None = None) -> CAEOutput:
        """Predict representations and ids of the masked patches.

        Args:
            images: ``(B, C, H, W)``, normalised as the backbone expects.
            token_ids: ``(B, P)`` int64 in ``[0, V)``, in raster order.
            order: ``(B, N)`` visiting orders; None draws them from the device's default generator.

        Returns:
            ``cross_entropy``: mean over masked patches, in nats. ``alignment``: mean squared error of the predicted
            representations. ``loss``: the weighted sum of both. ``accuracy``: share of masked patches whose most likely
            id is right. ``logits``: ``(B, T, V)`` in visiting order.
        """
        self.check_ids(images, token_ids)
        if order is None:
            order = self.draw_order(len(images), images.device)
        prefix, visible, masked = order.split([self.prefix, self.context_tokens - self.prefix, self.targets], dim=1)
        tokens = self.embed_tokens(images)
        z_visible = self.encode(gather_rows(tokens, torch.cat([prefix, visible], dim=1)))[:, self.prefix :]
        with torch.no_grad():
            aligned_to = self.encode(gather_rows(tokens, torch.cat([prefix, masked], dim=1)))[:, self.prefix :]

        positions = self.positions.expand(len(images), -1, -1)
        at_visible, at_masked = (gather_rows(positions, part - self.prefix) for part in (visible, masked))
        z_masked = self.mask_token.to(z_visible.dtype).expand(len(images), self.targets, -1)
        for block in self.regressor:
            z_masked = block(z_masked, z_visible, at_masked, at_visible)
        z_masked = self.regressor_norm(z_masked)

        logits = self.head(self.decoder_norm(self.decoder(z_masked + at_masked)))
        target_ids = token_ids.gather(1, masked - self.prefix)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), target_ids.flatten())
        alignment = F.mse_loss(z_masked.float(), aligned_to.float())
        return {
            "loss": cross_entropy + self.alignment_weight * alignment,
            "cross_entropy": cross_entropy.detach(),
            "alignment": alignment.detach(),
            "accuracy": (logits.detach().argmax(dim=-1) == target_ids).float().mean(),
            "logits": logits,
        }


class RegressorBlock(nn.Module):
    """Cross-attention and MLP; the queries alone are updated.

    Args:
        width: of queries, keys and values.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_query, self.norm_key, self.norm_value, self.norm_mlp = (norm(width) for _ in range(4))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = Mlp(width, 4 * width)
        self.scale_attention, self.scale_mlp = LayerScale(width, LAYER_SCALE), LayerScale(width, LAYER_SCALE)

    def forward(self, queries: Tensor, visible: Tensor, at_queries: Tensor, at_visible: Tensor) -> Tensor:
        """Update ``(B, T, D)`` queries from themselves and ``(B, n, D)`` visible patches, given their positions."""
        values = torch.cat([visible, queries], dim=1)
        keys = values + torch.cat([at_visible, at_queries], dim=1)
        attended = self.attention(
            self.norm_query(queries + at_queries), self.norm_key(keys), self.norm_value(values), need_weights=False
        )[0]
        queries = self.norm_mlp(queries + self.scale_attention(attended))
        return queries + self.scale_mlp(self.mlp(queries))  # type: ignore[no-any-return]
