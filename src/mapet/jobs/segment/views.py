"""Views of an image together with its mask: one box, one flip, each interpolated in its own way.

The input is ``(C + 1, H, W)`` as ``MaskedSet.load`` gives it, or the uint8 stand-in of a damaged image; as from other
views, two tensors come out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from mapet.data.augment import seeded
from mapet.data.seeds import Draw


@dataclass(frozen=True)
class MaskedCrop:
    """Random resized crop and flip.

    A crop's area is drawn between ``crop_min`` and all of what a window shows in evaluation, so that things have
    about the same scale in both.

    Args:
        size: rows and columns of the crop, and of a window, in pixels.
        short_side: what evaluation resizes an image's shorter side to; None: the window is the whole image.
        crop_min: least share of a window's area.
        flip: probability of a horizontal flip.
        mean, std: per-channel normalisation of the image.
        interpolation: of the image.
    """

    size: tuple[int, int]
    short_side: int | None
    crop_min: float
    flip: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __call__(self, stacked: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return ``(ids, image)``: ``(h, w)`` int64 and normalised ``(C, h, w)``."""
        rows, columns = stacked.shape[-2:]
        if self.short_side is None:
            shown, shape = 1.0, columns / rows
        else:
            resized = scaled_size((rows, columns), self.size, self.short_side)
            shown, shape = self.size[0] * self.size[1] / (resized[0] * resized[1]), self.size[1] / self.size[0]
        crop = RandomResizedCrop(1, scale=(self.crop_min * shown, shown), ratio=(shape * 3 / 4, shape * 4 / 3))
        with seeded(draw.geometry):
            box = crop.make_params([stacked])
            mirrored = bool(torch.rand(()) < self.flip)
        image, ids = (
            F.resized_crop(
                part.float(), **box, size=list(self.size), interpolation=InterpolationMode(mode), antialias=True
            )
            for part, mode in ((stacked[:-1], self.interpolation), (stacked[-1:], "nearest-exact"))
        )
        if mirrored:
            image, ids = F.horizontal_flip(image), F.horizontal_flip(ids)
        return ids[0].long(), F.normalize(image.clamp(0, 1), list(self.mean), list(self.std))


@dataclass(frozen=True)
class MaskedWhole:
    """The whole image, resized for windows to be laid over it, and its mask as it is: what evaluation sees.

    Args:
        size: rows and columns of a window in pixels.
        short_side: what the shorter side is resized to; None: the whole image to the size of a window.
        mean, std: per-channel normalisation of the image.
        interpolation: of the image.
    """

    size: tuple[int, int]
    short_side: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __call__(self, stacked: Tensor, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(ids, image)``: ``(H, W)`` int64 and normalised ``(C, h, w)``, no side smaller than a window's."""
        size = self.size if self.short_side is None else scaled_size(stacked.shape[-2:], self.size, self.short_side)
        mode = InterpolationMode(self.interpolation)
        image = F.resize(stacked[:-1].float(), list(size), interpolation=mode, antialias=True)
        return stacked[-1].long(), F.normalize(image.clamp(0, 1), list(self.mean), list(self.std))


def scaled_size(size: tuple[int, int] | torch.Size, window: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return the rows and columns of an image whose shorter side becomes ``short_side``, or what a window needs."""
    scale = max(short_side / min(size), window[0] / size[0], window[1] / size[1])
    return max(window[0], round(scale * size[0])), max(window[1], round(scale * size[1]))
