"""Augmentation for supervised training: timm's, every draw a function of the seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mapet.data.decode import from_pil
from mapet.data.seeds import Draw
from mapet.data.views import NOTHING

Augment = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class AugmentedView:
    """Random crop, flip, RandAugment or colour jitter, and erasing, as timm trains classifiers.

    Returns ``(nothing, student)`` as ``TrainView`` does.

    Args:
        size: rows and columns of the input in pixels.
        mean, std: per-channel normalisation of the input.
        crop_min: least share of the image's area that a crop covers.
        flip: probability of a horizontal flip.
        policy: timm's name of an augmentation policy, as "rand-m9-mstd0.5-inc1"; None for none.
        jitter: strength of brightness, contrast and saturation jitter, which a policy replaces.
        erasing: probability of overwriting a rectangle with noise.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_min: float
    flip: float
    policy: str | None
    jitter: float
    erasing: float
    _stages: tuple[Augment, Augment] = field(init=False, repr=False)
    _erase: Callable[[Tensor], Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        grey = len(self.mean) == 1
        crop, colour, _ = create_transform(
            self.size,
            is_training=True,
            separate=True,
            scale=(self.crop_min, 1.0),
            hflip=self.flip,
            auto_augment=self.policy,
            color_jitter=self.jitter or None,
            interpolation="bicubic",
            mean=self.mean * 3 if grey else self.mean,
            std=self.std * 3 if grey else self.std,
        )
        object.__setattr__(self, "_stages", (crop, colour))
        object.__setattr__(self, "_erase", RandomErasing(self.erasing, mode="pixel", device="cpu"))

    def __call__(self, image: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return nothing for a tokenizer, and the normalised input; 16-bit images are augmented in 8 bits."""
        crop, colour = self._stages
        pixels = F.to_pil_image(F.to_dtype(image, torch.uint8, scale=True)).convert("RGB")  # as timm's policies want it
        with seeded(draw.geometry):
            cropped = crop(pixels)
            try:
                coloured = colour(cropped)
            except ValueError as error:
                # timm may ask for a posterisation to 0 bits: once a black image, since Pillow 13 an error.
                if "bits" not in str(error):
                    raise
                coloured = cropped
            augmented = from_pil(coloured, len(self.mean))
            student = F.normalize(F.to_dtype(augmented, torch.float32, scale=True), list(self.mean), list(self.std))
            return NOTHING, self._erase(student)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's randomness on the CPU; afterwards it goes on as if nothing had been drawn."""
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
