"""CAE: context autoencoder (Chen et al., 2202.03026)."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.models.attention import LayoutMlp, apply_blocks, make_blocks
from mapet.objectives.base import Objective, check_counts, mask_vector, prediction_head
from mapet.objectives.masking import Mask
from mapet.objectives.patches import gather_rows, sincos_positions
from mapet.objectives.targets import Target
from mapet.objectives.task import Output

LAYER_SCALE = 0.1  # of regressor and decoder, as published
norm = partial(nn.LayerNorm, eps=1e-6)


class CAE(Objective):
    """Predict the representations of masked patches from the visible ones', and from those their token ids.

    Section 3.1 of the paper:

    - *Encoder*: the ViT on visible patches only; its output is ``Z_v``.
    - *Latent contextual regressor*: cross-attention from mask queries to ``Z_v`` and to themselves gives ``Z_m``;
      ``Z_v`` stays as it is.
    - *Alignment*: ``Z_m`` should equal what the same encoder, without a gradient, makes of the masked patches alone.
    - *Decoder*: self-attention over ``Z_m``, and a linear layer, predict the targets.
    - *Loss*: that of the target, and ``alignment_weight`` times the mean squared error of the alignment.

    Masks are BEiT's blocks, over half of the patches. Layers are those of the authors' code: queries and keys get
    fixed sine-cosine positions, the regressor sees no class token, the residual around its MLP begins after the norm.
    It departs from that code in that:

    - positions in the encoder are learned, and its initial weights are timm's, as every objective's;
    - regressor and decoder are as wide as the encoder and have no stochastic depth;
    - register tokens go into both passes of the encoder, as the class token does.

    Args:
        backbone, target, mask_ratio, masking: see ``Objective``.
        regressor_depth: cross-attention blocks.
        decoder_depth: self-attention blocks.
        alignment_weight: of the alignment.
    """

    default_masking = "blockwise"
    default_mask_ratio = 98 / 196
    target_loss = "target_loss"

    positions: Tensor

    def __init__(
        self,
        backbone: VisionTransformer,
        target: Target,
        mask_ratio: float | None = None,
        masking: str | None = None,
        *,
        regressor_depth: int = 4,
        decoder_depth: int = 4,
        alignment_weight: float = 2.0,
    ) -> None:
        super().__init__(backbone, target, mask_ratio, masking)
        check_counts(regressor_depth=regressor_depth, decoder_depth=decoder_depth)
        if isinstance(alignment_weight, bool | str) or not 0 <= alignment_weight < float("inf"):
            raise MapetError(f"objective argument alignment_weight is {alignment_weight!r}; it must be a number from 0")
        if self.targets == self.patches:
            raise MapetError(f"mask_ratio is {self.mask_ratio:g}, so no patch is visible to regress from; take less")
        self.alignment_weight = alignment_weight
        width, heads = backbone.embed_dim, backbone.blocks[0].attn.num_heads
        self.mask_token = mask_vector(width)
        self.regressor = nn.ModuleList([RegressorBlock(width, heads) for _ in range(regressor_depth)])
        self.regressor_norm = norm(width)
        self.decoder = make_blocks(decoder_depth, width, heads, init_values=LAYER_SCALE, norm_layer=norm)
        self.decoder_norm = norm(width)
        for module in (*self.regressor.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.head = prediction_head(width, target)
        self.register_buffer("positions", sincos_positions(self.grid, width), persistent=False)

    def read_targets(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the decoded representations of the masked patches; see ``Objective``."""
        return self.decode(self.regress(self.embed_tokens(images), mask), mask)

    def forward(self, images: Tensor, given: Tensor | None = None, mask: Mask | None = None) -> Output:
        """Return the loss of a batch; see ``Objective``.

        The output's ``target_loss`` is that of the target, ``alignment`` the mean squared error of the predicted
        representations, ``loss`` their weighted sum.
        """
        mask = mask or self.draw_mask(len(images), images.device)
        tokens = self.embed_tokens(images)
        z_masked = self.regress(tokens, mask)
        with torch.no_grad():
            aligned_to = self.encode(gather_rows(tokens, self.with_prefix(mask.target)))[:, self.prefix :]
        score = self.score(self.decode(z_masked, mask), images, given, mask)
        alignment = F.mse_loss(z_masked.float(), aligned_to.float())
        return {
            **score,
            "loss": score["loss"] + self.alignment_weight * alignment,
            "target_loss": score["loss"].detach(),
            "alignment": alignment.detach(),
        }

    def regress(self, tokens: Tensor, mask: Mask) -> Tensor:
        """Map all embedded tokens ``(B, prefix + P, D)`` to the representations ``Z_m``, ``(B, T, D)``."""
        z_visible = self.encode(gather_rows(tokens, self.with_prefix(mask.context)))[:, self.prefix :]
        at_visible, at_masked = (gather_rows(self.positions.expand(len(tokens), -1, -1), part) for part in mask)
        z_masked = self.mask_token.to(z_visible.dtype).expand(len(tokens), self.targets, -1)
        for block in self.regressor:
            z_masked = block(z_masked, z_visible, at_masked, at_visible)
        return self.regressor_norm(z_masked)  # type: ignore[no-any-return]

    def decode(self, z_masked: Tensor, mask: Mask) -> Tensor:
        """Map ``Z_m`` to what the head reads, ``(B, T, D)``."""
        at_masked = gather_rows(self.positions.expand(len(z_masked), -1, -1), mask.target)
        return self.decoder_norm(apply_blocks(self.decoder, z_masked + at_masked))  # type: ignore[no-any-return]


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
        self.mlp = LayoutMlp(width, 4 * width)
        self.scale_attention, self.scale_mlp = LayerScale(width, LAYER_SCALE), LayerScale(width, LAYER_SCALE)

    def forward(self, queries: Tensor, visible: Tensor, at_queries: Tensor, at_visible: Tensor) -> Tensor:
        """Update ``(B, T, D)`` queries from themselves and ``(B, n, D)`` visible patches, given their positions."""
        values = torch.cat([visible, queries], dim=1)
        keys = values + torch.cat([at_visible, at_queries], dim=1)
        attended = self.attention(
            self.norm_query(queries + at_queries), self.norm_key(keys), self.norm_value(values), need_weights=False
        )[0]
        queries = self.norm_mlp(queries + self.scale_attention(attended))
        return queries + self.mlp(queries, layer_scale=self.scale_mlp)  # type: ignore[no-any-return]
