"""Views: a decoded image becomes the tokenizer's image and the network's input.

``cut`` runs in a loading process: it crops and resizes one image and keeps its 8 bits, a quarter of a float's bytes.
``finish`` runs on the training device: it makes floats of a batch, changes their colours and normalises them.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from mapet.data.colour import draw_jitter, jittered
from mapet.data.seeds import Draw

F = v2.functional
NOTHING = torch.empty(0)  # in place of what is not needed
NO_DRAW = Draw(0, 0)  # for views without randomness

# An image whose aspect ratio differs from the output's by more than this factor loses its ends before it is resized.
MOST_STRETCH = 8


class Cut(NamedTuple):
    """What a loading process makes of an image; of a batch with a leading axis.

    Attributes:
        tokenizer_image: ``(C, H, W)``, uint8 or (of an image with more than 8 bits) float32 in [0, 1].
        image: likewise, for the network; empty if it is the same as ``tokenizer_image``.
        jitter: see ``colour.draw_jitter``; empty for none.
    """

    tokenizer_image: Tensor
    image: Tensor
    jitter: Tensor


class View(Protocol):
    """Makes ``tokenizer_images`` in [0, 1] and ``images``, normalised for the network."""

    def cut(self, image: Tensor, draw: Draw) -> Cut:
        """Return what ``finish`` needs of a decoded ``(C, H, W)`` image; the caller's random state does not change."""

    def finish(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Return ``(tokenizer_images, images)`` of a batch, ``(B, C, H, W)`` float32 each, on the device of ``cut``."""

    def __call__(self, image: Tensor, draw: Draw = NO_DRAW) -> tuple[Tensor, Tensor]:
        """Return both for a single image, without a leading axis."""
        tokenizer_images, images = self.finish(Cut(*(part[None] for part in self.cut(image, draw))))
        return tokenizer_images[0], images[0]


@dataclass(frozen=True)
class TrainView(View):
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

    def cut(self, image: Tensor, draw: Draw) -> Cut:
        """Crop and flip, the same for both outputs. The same ``draw`` gives the same views."""
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also queue seeds, each with a traceback, for devices not initialised yet.
            torch.default_generator.manual_seed(draw.geometry)
            box = self._random_crop.make_params([image])
            drawn = bool(torch.rand(()) < self.flip)
            mirrored = drawn if draw.mirrored is None else draw.mirrored
            jitter = draw_jitter(self._colour_jitter, draw.colour) if self.size and self.jitter else NOTHING
        tokenizer_image = _crop(image, box, self.view_size, mirrored) if self.view_size else NOTHING
        network_image = _crop(image, box, self.size, mirrored) if self.size not in (0, self.view_size) else NOTHING
        return Cut(tokenizer_image, network_image, jitter)

    def finish(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Return the crops in [0, 1], and jittered and normalised."""
        tokenizer_images = unit(cut.tokenizer_image)
        if not self.size:
            return tokenizer_images, cut.image
        images = tokenizer_images if self.size == self.view_size else unit(cut.image)
        if self.jitter:
            images = jittered(images, cut.jitter)
        return tokenizer_images, F.normalize(images, list(self.mean), list(self.std))


def unit(pixels: Tensor) -> Tensor:
    """Return pixels as float32 in [0, 1]; bicubic interpolation of floats may have left that range."""
    return pixels.clamp(0, 1) if pixels.is_floating_point() else F.to_dtype(pixels, torch.float32, scale=True)


def _crop(image: Tensor, box: dict[str, int], size: int, mirrored: bool) -> Tensor:
    crop = F.resized_crop(image, **box, size=[size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.horizontal_flip(crop) if mirrored else crop  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PlainView(View):
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

    def cut(self, image: Tensor, draw: Draw) -> Cut:
        """Resize and take the centre."""
        if not self.squash:
            image = _without_ends(image, self.size)
        size, mode = self._resized(*image.shape[-2:]), InterpolationMode(self.interpolation)
        return Cut(F.center_crop(F.resize(image, size, mode, antialias=True), list(self.size)), NOTHING, NOTHING)

    def finish(self, cut: Cut) -> tuple[Tensor, Tensor]:
        """Return the centres in [0, 1], and normalised."""
        centres = unit(cut.tokenizer_image)
        return centres, F.normalize(centres, list(self.mean), list(self.std))

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
    return F.center_crop(image, kept)  # type: ignore[no-any-return]
