"""Batches of images and masks: random crops for training, whole images for evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from mapet.data.augment import seeded
from mapet.data.batches import SampleKey
from mapet.data.seeds import Stream, fold_seed, name_number
from mapet.data.views import PlainView
from mapet.data.workers import one_thread
from mapet.jobs.segment.config import SegmentConfig
from mapet.jobs.segment.masks import MaskedSet

# Collated samples of SegmentationDataset: images (B, C, h, w) float32, masks (B, H, W) int64, index (B,).
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class MaskedViews:
    """Turns an image, ``(C, H, W)``, and its class ids, ``(H, W)``, into an input of the network with its class ids.

    Args:
        plain: size, normalisation and interpolation of the network's input.
        config: crops, flips, and size of the images in evaluation.
    """

    plain: PlainView
    config: SegmentConfig

    def random_crop(self, image: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return a random resized crop, perhaps flipped, of both: ``(C, h, w)`` and ``(h, w)`` of the input's size.

        The area of a crop is drawn between ``crop_min`` and all of the area that a window shows in evaluation, so that
        objects have about the same scale in training and in evaluation.
        """
        window, resized = self.plain.size, self.evaluated_size(ids.shape)
        shown = window[0] * window[1] / (resized[0] * resized[1])
        rows, columns = ids.shape if self.config.mode == "whole" else window
        ratio = (columns / rows * 3 / 4, columns / rows * 4 / 3)
        crop = RandomResizedCrop(1, scale=(self.config.crop_min * shown, shown), ratio=ratio)
        with seeded(seed):
            box = crop.make_params([image])
            flipped = bool(torch.rand(()) < self.config.flip)
        # torchvision's choice for masks, "nearest", is shifted by up to half a pixel.
        ids = F.resized_crop(ids[None], **box, size=list(window), interpolation=InterpolationMode.NEAREST_EXACT)[0]
        image = self._resized_part(image, box, window)
        return (F.horizontal_flip(image), F.horizontal_flip(ids)) if flipped else (image, ids)

    def whole_image(self, image: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the image resized for evaluation, and the class ids in full resolution."""
        box = {"top": 0, "left": 0, "height": ids.shape[0], "width": ids.shape[1]}
        return self._resized_part(image, box, self.evaluated_size(ids.shape)), ids

    def evaluated_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Return rows and columns to which an image of ``size`` is resized in evaluation, neither below a window's."""
        rows, columns = self.plain.size
        if self.config.mode == "whole":
            return rows, columns
        short_side = self.config.short_side or min(rows, columns)
        scale = max(short_side / min(size), rows / size[0], columns / size[1])
        return max(rows, round(scale * size[0])), max(columns, round(scale * size[1]))

    def _resized_part(self, image: Tensor, box: dict[str, int], size: tuple[int, int]) -> Tensor:
        image, mode = F.to_dtype(image, torch.float32, scale=True), InterpolationMode(self.plain.interpolation)
        part = F.resized_crop(image, **box, size=list(size), interpolation=mode, antialias=True).clamp(0, 1)
        return F.normalize(part, list(self.plain.mean), list(self.plain.std))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SegmentationDataset(Dataset[dict[str, Any]]):
    """Inputs of the network (``images``) with class ids (``masks``), by epoch and index.

    Args:
        images: readable images with masks.
        view: makes the input of the network and its class ids from an image, its class ids and a seed.
        channels: 1 or 3.
        seed: of crops and flips.
    """

    images: MaskedSet
    view: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    channels: int
    seed: int = 0

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        epoch, index = key
        seed = fold_seed(self.seed, Stream.VIEW, epoch, name_number(self.images.key(index)))
        with one_thread():
            image, mask = self.view(self.images.load(index, self.channels), self.images.load_mask(index), seed)
        return {"images": image, "masks": mask, "index": index}
