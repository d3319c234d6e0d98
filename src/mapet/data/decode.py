"""From a file or array to a ``(C, H, W)`` tensor, every image mode handled on purpose.

- 8-bit modes become uint8 tensors. Palettes are looked up; CMYK, YCbCr, LAB and HSV become RGB.
- Transparency is laid over white, as a browser would show it.
- Modes with more than 8 bits (16-bit grey, 32-bit integers, floats) become float32 in [0, 1], stretched
  from the image's own least to its greatest value: such files do not record where white is (12-bit X-rays
  in 16-bit files would be nearly black otherwise).
- The EXIF orientation is applied.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from mapet.errors import MapetError

DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def decode(path: str | Path, channels: int) -> Tensor:
    """Read an image file as ``(channels, H, W)``, uint8 or (more than 8 bits) float32 in [0, 1].

    Raises:
        OSError, ValueError, SyntaxError: if the file is missing, damaged or cut short, as Pillow does.
    """
    if not Path(path).is_file():  # a pipe would be waited for
        raise OSError("missing, or not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata that do not touch the pixels
        with Image.open(path) as opened:
            return from_pil(opened, channels)


def from_pil(opened: Image.Image, channels: int) -> Tensor:
    """Turn a Pillow image into ``(channels, H, W)`` as ``decode`` does with a file."""
    image = ImageOps.exif_transpose(opened)
    image.load()
    if image.mode in DEEP_MODES:
        return _stretched(torch.from_numpy(np.asarray(image).astype(np.float32)))[None].expand(channels, -1, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode != "L":
        image = image.convert("RGB")  # the one mode that all others can be turned into
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def to_channels(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], channels: int) -> Tensor:
    """Turn an ``(H, W)`` or ``(H, W, 3)`` uint8 array into a ``(channels, H, W)`` tensor."""
    image = torch.tensor(pixels)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    return image if len(image) == channels else rgb_to_grayscale(image, num_output_channels=channels)


def _stretched(values_HW: Tensor) -> Tensor:
    if not bool(values_HW.isfinite().all()):
        raise ValueError("the image contains NaN or infinity")
    low, high = values_HW.min(), values_HW.max()
    return (values_HW - low) / (high - low) if high > low else torch.zeros_like(values_HW)


def check_channels(channels: int) -> None:
    """Refuse channel counts that image files cannot be turned into."""
    if channels not in (1, 3):
        raise MapetError(f"channels is {channels}; image files are read as 1 (grey) or 3 (RGB) channels")
