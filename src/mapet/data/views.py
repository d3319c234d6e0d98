"""Views: the augmented image that both networks see, and the plain one for evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

BICUBIC = InterpolationMode.BICUBIC


@dataclass(frozen=True)
class TrainView:
    """Random resized crop and flip for both networks; colour jitter for the student only.

    The parameters are drawn by torchvision's transforms and applied by its functionals: on small images the
    transforms' own calls cost more than the work.

    Args:
        size: side of the square view in pixels.
        crop_min: least share of the image's area that a crop covers; 1 keeps nearly all of it.
        flip: probability of a horizontal flip.
        jitter: strength of brightness, contrast and saturation jitter; 0 for none.
        mean, std: per-channel normalisation of the student's input.
    """

    size: int
    crop_min: float
    flip: float
    jitter: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    _crop: v2.RandomResizedCrop = field(init=False, repr=False)
    _jitter: v2.ColorJitter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_crop", v2.RandomResizedCrop(self.size, scale=(self.crop_min, 1.0)))
        object.__setattr__(self, "_jitter", v2.ColorJitter(self.jitter, self.jitter, self.jitter))

    def __call__(self, image: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return ``(view, student)``: the view in [0, 1] for the tokenizer, the student's normalised input.

        All randomness comes from ``seed``; the caller's random state is left alone.
        """
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which also queues seeds, with a traceback each, for devices not yet in use.
            torch.default_generator.manual_seed(seed)
            box = self._crop.make_params([image])
            view = v2.functional.resized_crop(
                image, **box, size=[self.size, self.size], interpolation=BICUBIC, antialias=True
            )
            if torch.rand(()) < self.flip:
                view = v2.functional.horizontal_flip(view)
            view = v2.functional.to_dtype(view, torch.float32, scale=True).clamp(0, 1)
            student = self._jitter(view) if self.jitter else view
            return view, v2.functional.normalize(student, list(self.mean), list(self.std))


@dataclass(frozen=True)
class PlainView:
    """The centre square, resized: what evaluation sees.

    Returns ``(view, student)`` as ``TrainView`` does; ``seed`` is not used.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the view in [0, 1] and normalised."""
        square = v2.functional.center_crop(image, [min(image.shape[-2:])] * 2)
        resized = v2.functional.resize(square, [self.size, self.size], interpolation=BICUBIC, antialias=True)
        view = v2.functional.to_dtype(resized, torch.float32, scale=True).clamp(0, 1)
        return view, v2.functional.normalize(view, list(self.mean), list(self.std))
