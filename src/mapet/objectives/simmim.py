"""SimMIM: a simple framework for masked image modelling (Xie et al., 2111.09886)."""

import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor

from mapet.errors import MapetError
from mapet.objectives.base import Objective, check_counts, mask_vector, prediction_head
from mapet.objectives.masking import Mask, cell_masking
from mapet.objectives.patches import gather_rows
from mapet.objectives.targets import Pixels, Target


class SimMIM(Objective):
    """Replace patches by a mask vector, encode all of them, and read the missing pixels off with one linear layer.

    Section 3 of the paper:

    - *Masking* (3.2): square cells of 32 pixels, here 2 x 2 patches of 16, are masked at random; 60 % of them, rounded
      up.
    - *Encoder*: the ViT on all patches, with the mask vector in place of the masked patches' embeddings.
    - *Prediction head* (3.3): one linear layer.
    - *Target* (3.4): by default raw pixels; l1 loss on masked patches only.

    It departs from the authors' code in the encoder, which is every objective's: their ViT has relative position
    biases, shared by its blocks.

    Args:
        backbone, target, mask_ratio, masking: see ``Objective``.
        mask_cell: side of a cell in patches, for the masking ``cells``. None takes 2.
    """

    default_masking = "cells"
    default_mask_ratio = 0.6
    default_targets = "pixels"

    def __init__(
        self,
        backbone: VisionTransformer,
        target: Target | None = None,
        mask_ratio: float | None = None,
        masking: str | None = None,
        *,
        mask_cell: int | None = None,
    ) -> None:
        if mask_cell is not None:
            check_counts(mask_cell=mask_cell)
            if masking not in (None, "cells"):
                raise MapetError(f"mask_cell is given, but the masking {masking!r} has no cells; leave one of them out")
        self.mask_cell = mask_cell or 2
        super().__init__(backbone, target or self.pixels(backbone), mask_ratio, masking)
        self.mask_token = mask_vector(backbone.embed_dim)
        self.head = prediction_head(backbone.embed_dim, self.target)

    @classmethod
    def pixels(cls, backbone: VisionTransformer) -> Pixels:
        """Return raw pixels, compared by their mean absolute error."""
        return Pixels.of(backbone, normalised=False, distance="l1")

    def count_targets(self) -> int:
        """Return the patches of whole cells, their number rounded up as the authors do; never all patches."""
        if any(side % self.mask_cell for side in self.grid):
            return super().count_targets()
        cells = self.patches // self.mask_cell**2
        return min(math.ceil(self.mask_ratio * cells) * self.mask_cell**2, self.patches - 1)

    def draw_mask(self, batch: int, device: torch.device, generator: Generator | None = None) -> Mask:
        """Draw targets that are whole cells, as far as their number allows."""
        if self.masking != "cells":
            return super().draw_mask(batch, device, generator)
        return cell_masking(batch, self.grid, self.targets, generator, device, cell=self.mask_cell)

    def read_targets(self, images: Tensor, mask: Mask) -> Tensor:
        """Return the encoded mask vectors; see ``Objective``."""
        vit = self.backbone
        patches = vit.patch_embed(images)
        masked = torch.zeros(patches.shape[:2], dtype=torch.bool, device=images.device)
        masked = masked.scatter(1, mask.target, True)[:, :, None]
        encoded = self.encode(vit._pos_embed(torch.where(masked, self.mask_token.to(patches.dtype), patches)))
        return gather_rows(encoded, mask.target + self.prefix)
