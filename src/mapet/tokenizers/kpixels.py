"""k-pixels: k-means over the pixels of patches. Nothing to download: the embedded default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mapet.errors import MapetError
from mapet.tokenizers.base import KTokenizer

# Added to a patch's variance, so that sensor noise in flat patches is not blown up to full contrast: a
# tenth of the full range, the regulariser of Coates & Ng, "Learning feature representations with k-means"
# (2012), scaled from [0, 255] to [0, 1] and rounded up.
CONTRAST_FLOOR = 0.01


class KPixels(KTokenizer):
    """Ids are nearest centroids of patch pixels.

    Args:
        image_size: side of the square images in pixels.
        patch_size: side of a patch in pixels.
        channels: of the images.
        vocab_size: ``V``.
        contrast: normalise each patch to mean 0 and variance 1, so that ids tell structure rather than
            brightness; without it they tell both.
        spherical: see ``KTokenizer``.

    Raises:
        MapetError: if patches do not tile the image.
    """

    kind = "pixels"

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        vocab_size: int,
        contrast: bool = True,
        spherical: bool = False,
    ) -> None:
        if image_size % patch_size:
            raise MapetError(f"image size {image_size} is not divisible by the patch size {patch_size}")
        side = image_size // patch_size
        super().__init__((side, side), vocab_size, image_size, channels, channels * patch_size**2, spherical)
        self.patch_size = patch_size
        self.contrast = contrast

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "image_size": self.input_size,
            "patch_size": self.patch_size,
            "channels": self.channels,
            "vocab_size": self.vocab_size,
            "contrast": self.contrast,
            "spherical": self.spherical,
        }

    def patch_features(self, images: Tensor) -> Tensor:
        """Cut ``(B, C, H, W)`` images into ``(B, P, C * patch * patch)`` pixels."""
        expected = (self.channels, self.input_size, self.input_size)
        if tuple(images.shape[1:]) != expected:
            raise MapetError(f"images have shape {tuple(images.shape[1:])}, but this tokenizer reads {expected}")
        patches = torch.nn.functional.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        if self.contrast:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
            patches = (patches - mean) * torch.rsqrt(variance + CONTRAST_FLOOR)
        return patches
