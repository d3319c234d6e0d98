"""MAE: masked autoencoders (He et al., 2111.06377)."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.objectives.base import Objective, PixelOutput, check_counts, mask_vector
from mapet.objectives.patches import gather_rows, patchify, sincos_positions


class MAE(Objective):
    """Encode the visible patches alone; reconstruct the pixels of the others with a decoder that is thrown away.

    Section 3 of the paper:

    - *Masking*: patches are sampled uniformly, 75 % are removed.
    - *Encoder*: the ViT on visible patches only, without mask vectors.
    - *Decoder*: narrow blocks on the full set: encoded patches, and a shared mask vector at every missing one, all with
      fixed sine-cosine positions.
    - *Target*: the pixels of each missing patch, normalised by their own mean and standard deviation; mean squared
      error on missing patches only.

    Pixels are those that the network sees, so after normalisation by the input's mean and deviation.
    It departs from the authors' code in the encoder, which is every objective's: its positions are learned, its
    initial weights are timm's, and it may have stochastic depth.

    Args:
        backbone: a timm ``VisionTransformer``. It is used, not copied.
        context_tokens: ``c``, class token and visible patches.
        order: how patches are chosen.
        decoder_depth: blocks of the decoder.
        decoder_dim: ``d``, their width.
        decoder_heads: their attention heads.
    """

    default_order = "random"
    target_share = 147 / 196
    needs_ids = False

    positions: Tensor

    def __init__(
        self,
        backbone: VisionTransformer,
        context_tokens: int | None = None,
        order: str | None = None,
        *,
        decoder_depth: int = 8,
        decoder_dim: int = 512,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__(backbone, context_tokens, order)
        check_counts(decoder_depth=decoder_depth, decoder_dim=decoder_dim, decoder_heads=decoder_heads)
        if decoder_dim % decoder_heads:
            raise MapetError(f"decoder_dim {decoder_dim} is not divisible among {decoder_heads} decoder_heads")
        pixels = math.prod(self.patch_size) * backbone.patch_embed.proj.in_channels
        if pixels < 2:
            raise MapetError("patches of one pixel have no deviation to be normalised by; take a larger --patch-size")
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.mask_token = mask_vector(decoder_dim)
        self.decoder_embed = nn.Linear(backbone.embed_dim, decoder_dim)
        self.decoder = nn.Sequential(
            *[Block(decoder_dim, decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth)]
        )
        self.decoder_norm = norm(decoder_dim)
        self.head = nn.Linear(decoder_dim, pixels)
        for module in (self.decoder_embed, *self.decoder.modules(), self.head):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The class and register tokens have no place in the image.
        positions = F.pad(sincos_positions(self.grid, decoder_dim), (0, 0, self.prefix, 0))
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, images: Tensor, order: Tensor | None = None) -> PixelOutput:
        """Reconstruct the missing patches.

        Args:
            images: ``(B, C, H, W)``, normalised as the backbone expects.
            order: ``(B, N)`` visiting orders; None draws them from the device's default generator.

        Returns:
            ``loss``: mean squared error per normalised pixel; always answering a patch's mean gives 1, or less where
            patches are flat. ``prediction``: ``(B, T, p * p * C)`` normalised pixels, channels last, in visiting order.
        """
        if order is None:
            order = self.draw_order(len(images), images.device)
        visible = gather_rows(self.embed_tokens(images), order[:, : self.context_tokens])
        latent = self.decoder_embed(self.encode(visible))

        # The decoder sees the tokens in visiting order: its blocks do not mind, since positions travel with them.
        missing = self.mask_token.to(latent.dtype).expand(len(images), self.targets, -1)
        positions = gather_rows(self.positions.expand(len(images), -1, -1), order)
        decoded = self.decoder(torch.cat([latent, missing], dim=1) + positions)
        prediction = self.head(self.decoder_norm(decoded[:, -self.targets :]))

        pixels = gather_rows(patchify(images, self.patch_size), order[:, -self.targets :] - self.prefix)
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        target = (pixels - mean) / (variance + 1e-6).sqrt()
        return {"loss": F.mse_loss(prediction, target), "prediction": prediction}
