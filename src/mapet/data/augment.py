"""Augmentation for supervised training: timm's transforms, with all randomness from a seed."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter
from torchvision.transforms.v2 import functional as F

from mapet.data.colour import draw_jitter, jittered
from mapet.data.decode import from_pil
from mapet.data.reading import Reading
from mapet.data.seeds import Draw
from mapet.data.views import NOTHING, Cut, View, unit

Augment = Callable[[Any], Any]  # of Pillow images or tensors


@dataclass(frozen=True)
class AugmentedView(View):
    """Random crop, flip, RandAugment or colour jitter, and random erasing, as timm trains classifiers.

    Args:
        size: rows and columns of the output in pixels.
        mean, std: normalisation of each channel.
        crop_min: smallest share of the image's area that a crop covers.
        flip: probability of a horizontal flip.
        policy: timm's name of an augmentation policy, for instance "rand-m9-mstd0.5-inc1"; None for none, as for
            images of other channels than 1 and 3.
        jitter: strength of brightness, contrast and (of 3 channels) saturation jitter; unused with a policy.
        erasing: probability of replacing a rectangle by noise.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_min: float
    flip: float
    policy: str | None
    jitter: float
    erasing: float

    def cut(self, image: Tensor, draw: Draw) -> Cut:
        """Do all of the work: timm's transforms take single images. 16-bit images are augmented in 8 bits."""
        with seeded(draw.geometry):
            augmented = self._recoloured(image) if len(self.mean) in (1, 3) else self._jittered(image, draw.colour)
            images = F.normalize(augmented, list(self.mean), list(self.std))
            return Cut(NOTHING, RandomErasing(self.erasing, mode="pixel", device="cpu")(images), NOTHING)

    def _jittered(self, image: Tensor, seed: int) -> Tensor:
        """Return a crop with other brightness and contrast, for channels that are no colours."""
        cropped = unit(self._crop_and_colour[0](F.to_dtype(image, torch.float32, scale=True)))
        if not self.jitter:
            return cropped
        drawn = draw_jitter(ColorJitter(self.jitter, self.jitter, self.jitter), seed)
        return jittered(cropped[None], drawn[None])[0]

    def _recoloured(self, image: Tensor) -> Tensor:
        """Return a crop that timm's policy or jitter has changed."""
        crop, colour = self._crop_and_colour
        pixels = F.to_pil_image(F.to_dtype(image, torch.uint8, scale=True)).convert("RGB")  # timm's policies need RGB
        cropped = crop(pixels)
        try:
            coloured = colour(cropped)
        except ValueError as error:
            # timm may posterise to 0 bits, which Pillow 13 refuses; before, it gave a black image.
            if "bits" not in str(error):
                raise
            coloured = cropped
        augmented: Tensor = F.to_dtype(from_pil(coloured, Reading(len(self.mean))), torch.float32, scale=True)
        return augmented

    def finish(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Return an empty tensor, and the normalised augmentations."""
        return cut.tokenizer_image, cut.image

    @cached_property
    def _crop_and_colour(self) -> tuple[Augment, Augment]:
        crop, colour, _ = create_transform(
            self.size,
            is_training=True,
            separate=True,
            scale=(self.crop_min, 1.0),
            hflip=self.flip,
            auto_augment=self.policy,
            color_jitter=self.jitter or None,
            interpolation="bicubic",
            # Of the normalisation, timm uses only the mean here: as the colour of what a policy moves into the image.
            mean=self.mean if len(self.mean) == 3 else self.mean[:1] * 3,
        )
        return crop, colour


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (on the CPU) inside the block; restore their random states afterwards."""
    python: Any = random.getstate()
    numpy: Any = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
