"""View functions: a decoded image becomes the tokenizer's image and the network's input."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from mapet.data.seeds import Draw

# From a decoded image to (tokenizer_images in [0, 1], images normalised for the network), each (C, H, W).
View = Callable[[Tensor, Draw], tuple[Tensor, Tensor]]
NOTHING = torch.empty(0)  # in place of an output that is not needed

# An image whose aspect ratio differs from the output's by more than this factor loses its ends before it is resized.
MOST_STRETCH = 8


@dataclass(frozen=True)
class TrainView:
    """Random resized crop and flip for both outputs; colour jitter for ``images`` only.

    torchvision's transforms draw the parameters and its functionals apply them: for small images, calling the
    transforms themselves takes longer than the image processing.

    Args:
        size: side of ``images`` in pixels; 0 for none.
        view_size: side of ``tokenizer_images`` in pixels; 0 for none.
        crop_min: smallest share of the image's area that a crop covers; 1 keeps almost the whole image.
        flip: probability of a horizontal flip.
        jitter: strength of brightness, contrast and saturation jitter; 0 for none.
        mean, std: normalisation of each channel of ``images``.
    """

    size: int
    view_size: int
    crop_min: float
    flip: float
    jitter: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    _random_crop: v2.RandomResizedCrop = field(init=False, repr=False)
    _colour_jitter: v2.ColorJitter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_random_crop", v2.RandomResizedCrop(1, scale=(self.crop_min, 1.0)))
        object.__setattr__(self, "_colour_jitter", v2.ColorJitter(self.jitter, self.jitter, self.jitter))

    def __call__(self, image: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return ``(tokenizer_images, images)``: the same crop in [0, 1], and jittered and normalised.

        The same ``draw`` gives the same views. The caller's random state does not change.
        """
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also queue seeds, each with a traceback, for devices not initialised yet.
            torch.default_generator.manual_seed(draw.geometry)
            box = self._random_crop.make_params([image])
            drawn = bool(torch.rand(()) < self.flip)
            mirrored = drawn if draw.mirrored is None else draw.mirrored
            tokenizer_images = _crop(image, box, self.view_size, mirrored) if self.view_size else NOTHING
            if not self.size:
                return tokenizer_images, NOTHING
            same = self.size == self.view_size
            images = tokenizer_images if same else _crop(image, box, self.size, mirrored)
            if self.jitter:
                torch.default_generator.manual_seed(draw.colour)
                images = self._colour_jitter(images)
            return tokenizer_images, v2.functional.normalize(images, list(self.mean), list(self.std))


def _crop(image: Tensor, box: dict[str, int], size: int, mirrored: bool) -> Tensor:
    crop = v2.functional.resized_crop(image, **box, size=[size, size], interpolation=InterpolationMode.BICUBIC)
    if mirrored:
        crop = v2.functional.horizontal_flip(crop)
    return v2.functional.to_dtype(crop, torch.float32, scale=True).clamp(0, 1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PlainView:
    """The resized centre of an image, as timm transforms images for evaluation; nothing is random.

    Args:
        size: rows and columns of both outputs in pixels.
        mean, std: normalisation of each channel of ``images``.
        crop_pct: the output's side as a share of the resized image's side.
        interpolation: "bicubic", "bilinear" or "nearest".
        squash: resize both sides to the output's whatever the image's aspect ratio, so that nothing is cut off
            (timm's ``crop_mode="squash"``).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    squash: bool = False

    def __call__(self, image: Tensor, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(tokenizer_images, images)``: the centre in [0, 1], and normalised."""
        if not self.squash:
            image = _without_ends(image, self.size)
        resized = v2.functional.resize(image, self._resized(*image.shape[-2:]), InterpolationMode(self.interpolation))
        centre = v2.functional.center_crop(resized, list(self.size))
        centre = v2.functional.to_dtype(centre, torch.float32, scale=True).clamp(0, 1)
        return centre, v2.functional.normalize(centre, list(self.mean), list(self.std))

    def _resized(self, height: int, width: int) -> list[int]:
        """Return rows and columns before the crop, rounded as timm rounds; one number is the shorter side."""
        rows, columns = (int(side / self.crop_pct) for side in self.size)
        if self.squash:
            return [rows, columns]
        if rows == columns:
            return [rows]
        ratio = min(height / rows, width / columns)
        return [round(height / ratio), round(width / ratio)]


def _without_ends(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the ends off a long strip: the crop never shows them, and the resized strip could exceed the memory."""
    scale = MOST_STRETCH * min(side / wanted for side, wanted in zip(image.shape[-2:], size, strict=True))
    kept = [min(side, round(scale * wanted)) for side, wanted in zip(image.shape[-2:], size, strict=True)]
    return v2.functional.center_crop(image, kept)  # type: ignore[no-any-return]
