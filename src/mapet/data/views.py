"""Views: the augmented image that both networks see, and the plain one for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from mapet.data.seeds import Draw

BICUBIC = InterpolationMode.BICUBIC

# From a decoded image to (the tokenizer's view in [0, 1], the student's normalised input).
View = Callable[[Tensor, Draw], tuple[Tensor, Tensor]]
NOTHING = torch.empty(0)

# Images longer than so many times the input's proportions lose their ends before they are resized.
MOST_STRETCH = 8


@dataclass(frozen=True)
class TrainView:
    """Random resized crop and flip for both networks; colour jitter for the student only.

    The parameters are drawn by torchvision's transforms and applied by its functionals: on small images the
    transforms' own calls cost more than the work.

    Args:
        size: side of the student's square input in pixels; 0 for none.
        view_size: side of the tokenizer's view of the same crop; 0 for none.
        crop_min: least share of the image's area that a crop covers; 1 keeps nearly all of it.
        flip: probability of a horizontal flip.
        jitter: strength of brightness, contrast and saturation jitter; 0 for none.
        mean, std: per-channel normalisation of the student's input.
    """

    size: int
    view_size: int
    crop_min: float
    flip: float
    jitter: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    _crop: v2.RandomResizedCrop = field(init=False, repr=False)
    _jitter: v2.ColorJitter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_crop", v2.RandomResizedCrop(1, scale=(self.crop_min, 1.0)))
        object.__setattr__(self, "_jitter", v2.ColorJitter(self.jitter, self.jitter, self.jitter))

    def __call__(self, image: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return ``(view, student)``: the view in [0, 1] for the tokenizer, the student's normalised input.

        All randomness comes from ``draw``; the caller's random state is left alone.
        """
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which also queues seeds, with a traceback each, for devices not yet in use.
            torch.default_generator.manual_seed(draw.geometry)
            box = self._crop.make_params([image])
            drawn = bool(torch.rand(()) < self.flip)
            mirrored = drawn if draw.mirrored is None else draw.mirrored
            view = _crop(image, box, self.view_size, mirrored) if self.view_size else NOTHING
            if not self.size:
                return view, NOTHING
            student = view if self.size == self.view_size else _crop(image, box, self.size, mirrored)
            if self.jitter:
                torch.default_generator.manual_seed(draw.colour)
                student = self._jitter(student)
            return view, v2.functional.normalize(student, list(self.mean), list(self.std))


def _crop(image: Tensor, box: dict[str, int], size: int, mirrored: bool) -> Tensor:
    crop = v2.functional.resized_crop(image, **box, size=[size, size], interpolation=BICUBIC, antialias=True)
    if mirrored:
        crop = v2.functional.horizontal_flip(crop)
    return v2.functional.to_dtype(crop, torch.float32, scale=True).clamp(0, 1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PlainView:
    """The centre of an image in the input's proportions, resized: what evaluation sees, as timm has it.

    Returns ``(view, student)`` as ``TrainView`` does; nothing about it is random.

    Args:
        size: rows and columns of the input in pixels.
        mean, std: per-channel normalisation of the input.
        crop_pct: share of the resized image's side that the input shows.
        interpolation: "bicubic", "bilinear" or "nearest".
        squash: resize both sides to the input's, whatever the image's proportions, so that nothing is cut off
            (timm's ``crop_mode="squash"``).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    squash: bool = False

    def __call__(self, image: Tensor, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
        """Return the view in [0, 1] and normalised."""
        if not self.squash:
            image = _shortened(image, self.size)
        resized = v2.functional.resize(
            image, self._resized(*image.shape[-2:]), InterpolationMode(self.interpolation), antialias=True
        )
        view = v2.functional.center_crop(resized, list(self.size))
        view = v2.functional.to_dtype(view, torch.float32, scale=True).clamp(0, 1)
        return view, v2.functional.normalize(view, list(self.mean), list(self.std))

    def _resized(self, height: int, width: int) -> list[int]:
        """Rows and columns before the crop; one number is the shorter side. Rounded as timm rounds."""
        rows, columns = (int(side / self.crop_pct) for side in self.size)
        if self.squash:
            return [rows, columns]
        if rows == columns:
            return [rows]
        ratio = min(height / rows, width / columns)
        return [round(height / ratio), round(width / ratio)]


def _shortened(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the ends off a strip: no crop shows them, and resized with it they could fill the memory."""
    scale = MOST_STRETCH * min(side / wanted for side, wanted in zip(image.shape[-2:], size, strict=True))
    kept = [min(side, round(scale * wanted)) for side, wanted in zip(image.shape[-2:], size, strict=True)]
    return v2.functional.center_crop(image, kept)  # type: ignore[no-any-return]
