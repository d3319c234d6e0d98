"""SimMIM: a simple framework for masked image modelling (Xie et al., 2111.09886)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from mapet.errors import MapetError
from mapet.objectives.base import Objective, PixelOutput, check_counts, mask_vector
from mapet.objectives.masking import cell_order
from mapet.objectives.patches import gather_rows, patchify


class SimMIM(Objective):
    """Replace patches by a mask vector, encode all of them, and read the missing pixels off with one linear layer.

    Section 3 of the paper:

    - *Masking* (3.2): square cells of 32 pixels, here 2 x 2 patches of 16, are masked at random; 60 % of them.
    - *Encoder*: the ViT on all patches, the mask vector in place of the masked ones' embeddings.
    - *Prediction head* (3.3): one linear layer.
    - *Target* (3.4): raw pixels, l1 loss on masked patches only.

    Pixels are those that the network sees, so after normalisation by the input's mean and deviation. It departs from
    the authors' code in the encoder, which is every objective's: their ViT has relative position biases, shared by its
    blocks.

    Args:
        backbone: a timm ``VisionTransformer``. It is used, not copied.
        context_tokens: ``c``, class token and visible patches.
        order: how patches are chosen.
        mask_cell: side of a cell in patches; for the order ``cells`` alone. None takes 2.
    """

    default_order = "cells"
    target_share = 0.6
    needs_ids = False

    def __init__(
        self,
        backbone: VisionTransformer,
        context_tokens: int | None = None,
        order: str | None = None,
        *,
        mask_cell: int | None = None,
    ) -> None:
        if mask_cell is not None:
            check_counts(mask_cell=mask_cell)
            if order not in (None, "cells"):
                raise MapetError(f"mask_cell is given, but the order {order!r} has no cells; leave one of them out")
        self.mask_cell = mask_cell or 2
        super().__init__(backbone, context_tokens, order)
        self.mask_token = mask_vector(backbone.embed_dim)
        self.head = nn.Linear(backbone.embed_dim, math.prod(self.patch_size) * backbone.patch_embed.proj.in_channels)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def default_targets(self) -> int:
        """60 % of the cells, rounded up as the authors do; never all patches."""
        if any(side % self.mask_cell for side in self.grid):
            return super().default_targets()
        cells = self.patches // self.mask_cell**2
        return min(math.ceil(self.target_share * cells) * self.mask_cell**2, max(1, self.patches - 1))

    def draw_order(self, batch: int, device: torch.device, generator: Generator | None = None) -> Tensor:
        """Draw ``(B, N)`` visiting orders whose targets are whole cells, as far as their number allows."""
        if self.order != "cells":
            return super().draw_order(batch, device, generator)
        return cell_order(batch, self.grid, self.prefix, self.targets, generator, device, cell=self.mask_cell)

    def forward(self, images: Tensor, order: Tensor | None = None) -> PixelOutput:
        """Reconstruct the masked patches.

        Args:
            images: ``(B, C, H, W)``, normalised as the backbone expects.
            order: ``(B, N)`` visiting orders; None draws them from the device's default generator.

        Returns:
            ``loss``: mean absolute error per pixel. ``prediction``: ``(B, T, p * p * C)`` pixels, channels last, in
            visiting order.
        """
        if order is None:
            order = self.draw_order(len(images), images.device)
        targets = order[:, -self.targets :]
        vit = self.backbone
        patches = vit.patch_embed(images)
        masked = torch.zeros(patches.shape[:2], dtype=torch.bool, device=images.device)
        masked = masked.scatter(1, targets - self.prefix, True)[:, :, None]
        encoded = self.encode(vit._pos_embed(torch.where(masked, self.mask_token.to(patches.dtype), patches)))
        prediction = self.head(gather_rows(encoded, targets))
        pixels = gather_rows(patchify(images, self.patch_size), targets - self.prefix)
        return {"loss": F.l1_loss(prediction, pixels), "prediction": prediction}
