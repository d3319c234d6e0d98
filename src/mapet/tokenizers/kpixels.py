"""k-pixels: k-means over the pixels of patches. It needs no download and is the default tokenizer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.errors import MapetError
from mapet.tokenizers.base import KTokenizer

# Added to a patch's variance, so that sensor noise in flat patches is not scaled to full contrast: a tenth of the full
# range, the regulariser of Coates & Ng, "Learning feature representations with k-means" (2012), scaled from [0, 255] to
# [0, 1] and rounded up.
CONTRAST_FLOOR = 0.01


class KPixels(KTokenizer):
    """A tokenizer whose ids are the nearest centroids of patch pixels.

    Args:
        image_size: side of the square images in pixels.
        patch_size: side of a patch in pixels.
        channels: channels of the images.
        vocab_size: ``V``.
        contrast: normalise each patch to mean 0 and variance 1, so that ids depend on structure but not on brightness.
        spherical: see ``KTokenizer``.

    Raises:
        MapetError: if the image size is not a multiple of the patch size.
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
        self.patch_size, self.contrast = patch_size, contrast
        sizes = {"image_size": image_size, "patch_size": patch_size, "channels": channels, "vocab_size": vocab_size}
        self.config = {**sizes, "contrast": contrast, "spherical": spherical}

    def patch_features(self, images: Tensor) -> Tensor:
        """Cut ``(B, C, H, W)`` images into ``(B, P, C * patch * patch)`` pixels."""
        expected = (self.channels, self.input_size, self.input_size)
        if images.shape[1:] != expected:
            raise MapetError(f"images have shape {tuple(images.shape[1:])}, but this tokenizer reads {expected}")
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        if self.contrast:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
            patches = (patches - mean) * torch.rsqrt(variance + CONTRAST_FLOOR)
        return patches
