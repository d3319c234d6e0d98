"""Decoding of image files and arrays to ``(C, H, W)`` tensors.

- 8-bit modes become uint8 tensors. Palettes are looked up; CMYK, YCbCr, LAB and HSV become RGB.
- Transparent pixels are blended with a white background, as web browsers do.
- Modes with more than 8 bits (16-bit grey, 32-bit integers, floats) become float32 in [0, 1]: each image is
  stretched from its own minimum to its own maximum, because such files do not record which value is white
  (12-bit X-rays in 16-bit files would be nearly black otherwise).
- The EXIF orientation is applied.
"""

import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import rgb_to_grayscale

ORIENTATION = 0x0112  # number of the EXIF tag
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: if the file is missing, is not a regular file or cannot be read.
    """
    if not path.is_file():  # reading from a pipe would wait for ever
        raise OSError("missing, or not a regular file")
    return path.read_bytes()


def decode(path: str | Path, channels: int) -> Tensor:
    """Read an image file as ``(channels, H, W)``, uint8 or (more than 8 bits) float32 in [0, 1].

    Raises:
        OSError, ValueError, SyntaxError: if the file is missing, damaged or truncated, as Pillow raises them.
    """
    return decode_bytes(read_file(Path(path)), channels)


def decode_bytes(content: bytes, channels: int) -> Tensor:
    """Decode the bytes of an image file; see ``decode``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of unusual metadata, which do not affect the pixels
        try:
            opened = Image.open(BytesIO(content))
        except UnidentifiedImageError:  # its message would name the BytesIO object
            raise UnidentifiedImageError("not an image of a known format") from None
        with opened:
            if opened.format == "JPEG" and (opened.mode == "L" or (opened.mode == "RGB" and channels == 3)):
                with suppress(RuntimeError):  # Pillow says better what is wrong
                    return _decode_jpeg(content, channels, opened.getexif().get(ORIENTATION))
            return from_pil(opened, channels)


def _decode_jpeg(content: bytes, channels: int, orientation: object) -> Tensor:
    """Decode a JPEG of a mode that needs no conversion of colours.

    torchvision and Pillow call the same decoder and return the same pixels, but Pillow copies them three times.
    """
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    stored = torch.frombuffer(content, dtype=torch.uint8)
    return decode_jpeg(stored, mode, apply_exif_orientation=orientation in range(2, 9))  # type: ignore[no-any-return]


def from_pil(opened: Image.Image, channels: int) -> Tensor:
    """Convert a Pillow image to ``(channels, H, W)``; see ``decode``."""
    image = ImageOps.exif_transpose(opened)
    image.load()
    if image.mode in DEEP_MODES:
        return _stretched(torch.from_numpy(np.asarray(image).astype(np.float32)))[None].expand(channels, -1, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode != "L":
        image = image.convert("RGB")  # Pillow converts every mode to RGB, but not every mode to L
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def to_channels(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], channels: int) -> Tensor:
    """Convert an ``(H, W)`` or ``(H, W, 3)`` uint8 array to a ``(channels, H, W)`` tensor."""
    image = torch.tensor(pixels)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    return image if len(image) == channels else rgb_to_grayscale(image, num_output_channels=channels)


def _stretched(values_HW: Tensor) -> Tensor:
    if not bool(values_HW.isfinite().all()):
        raise ValueError("the image contains NaN or infinity")
    low, high = values_HW.min(), values_HW.max()
    return (values_HW - low) / (high - low) if high > low else torch.zeros_like(values_HW)
