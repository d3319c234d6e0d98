"""Decoding of image files to ``(C, H, W)`` tensors.

- 8-bit modes become uint8 tensors. Palettes are looked up; CMYK, YCbCr, LAB and HSV become RGB.
- Transparent pixels are blended with a white background, as web browsers do; with 4 channels, alpha is the fourth.
- Modes with more than 8 bits (16-bit grey, 32-bit integers, floats) become float32 in [0, 1]. Without a value range
  each image is stretched from its own minimum to its own maximum, because such files do not record which value is
  white (12-bit X-rays in 16-bit files would be nearly black otherwise).
- The pages or bands of a TIFF and the last or first axis of an ``.npy`` array are channels.
- The EXIF orientation is applied.
"""

import os
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mapet.data.npy import MAGIC, decode_npy, from_array
from mapet.data.reading import Reading, check_bytes
from mapet.data.tiff import MAGICS, decode_bands, decode_pages, loses_bands

ORIENTATION = 0x0112  # number of the EXIF tag
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
PNG_BITS = 24  # where a PNG file has its bits per channel

# Progressive JPEGs have about ten scans. Each scan takes the time of a whole image but perhaps only ten bytes, so that
# the size of a file does not bound the time.
START_OF_SCAN, MOST_SCANS = b"\xff\xda", 100


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a file; no more are read than the file has when it is opened.

    Raises:
        OSError: if the file is missing, is not a regular file, is empty, or cannot be read.
        ValueError: if it is too large.
    """
    if not path.is_file():  # reading from a pipe would wait for ever
        raise OSError("missing, or not a regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # also the files of /proc, some of which never end
            raise OSError("the file is empty")
        check_bytes(size, max_bytes)
        return file.read(size)


def decode(path: str | Path, reading: Reading) -> Tensor:
    """Read an image file as ``(C, H, W)``, uint8 or (more than 8 bits) float32 in [0, 1].

    Raises:
        OSError, ValueError, SyntaxError: if the file is missing, damaged, truncated or too large, or does not fit.
    """
    return decode_bytes(read_file(Path(path), reading.max_bytes), reading)


def decode_bytes(content: bytes, reading: Reading) -> Tensor:
    """Decode the bytes of an image file; see ``decode``. Sizes are checked before memory is taken for pixels."""
    check_bytes(len(content), reading.max_bytes)
    if content.startswith(MAGIC):
        return decode_npy(content, reading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of unusual metadata, which do not affect the pixels
        try:
            opened = Image.open(BytesIO(content))
        except UnidentifiedImageError:  # its message would name the BytesIO object
            if content.startswith(MAGICS):
                return decode_bands(content, reading)
            raise UnidentifiedImageError("not an image of a known format") from None
        with opened:
            return _decode_opened(opened, content, reading)


def _decode_opened(opened: Image.Image, content: bytes, reading: Reading) -> Tensor:
    reading.check_pixels(opened.height, opened.width)
    if opened.format == "TIFF":
        if loses_bands(opened, reading):
            return decode_bands(content, reading)
        if (image := decode_pages(content, reading)) is not None:
            return image
    if opened.format == "PNG" and reading.value_range and content[PNG_BITS] > 8 and opened.mode not in DEEP_MODES:
        raise ValueError("16-bit colours of a PNG are read as 8 bits, to which no value range applies; save a TIFF")
    if opened.format in ("JPEG", "MPO") and (scans := content.count(START_OF_SCAN)) > MOST_SCANS:
        raise ValueError(f"the JPEG has {scans} scans, more than {MOST_SCANS}")
    as_stored = reading.channels == {"L": 1, "RGB": 3}.get(opened.mode)
    if opened.format == "JPEG" and (as_stored or (opened.mode == "L" and reading.channels == 3)):
        with suppress(RuntimeError):  # Pillow says better what is wrong
            return _decode_jpeg(content, reading.channels, opened.getexif().get(ORIENTATION))
    return from_pil(opened, reading)


def _decode_jpeg(content: bytes, channels: int, orientation: object) -> Tensor:
    """Decode a JPEG of a mode that needs no conversion of colours.

    torchvision and Pillow call the same decoder and return the same pixels, but Pillow copies them three times.
    """
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    stored = torch.frombuffer(content, dtype=torch.uint8)
    return decode_jpeg(stored, mode, apply_exif_orientation=orientation in range(2, 9))  # type: ignore[no-any-return]


def from_pil(opened: Image.Image, reading: Reading) -> Tensor:
    """Convert a Pillow image to ``(C, H, W)``; see ``decode``."""
    image = ImageOps.exif_transpose(opened)
    image.load()
    if image.mode in DEEP_MODES:
        values = torch.from_numpy(np.asarray(image).astype(np.float32))[None]
        return reading.finished(values)
    if reading.channels not in (1, 3, 4):
        return from_array(np.asarray(image), reading)
    if reading.channels == 4:
        if image.mode in ("1", "L") and not image.has_transparency_data:
            reading.check_channels(1)
        image = image.convert("RGBA")
    else:
        image = _opaque(image).convert("L" if reading.channels == 1 else "RGB")
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if reading.channels == 1 else pixels.permute(2, 0, 1)


def _opaque(image: Image.Image) -> Image.Image:
    """Return an image as L or RGB, blended with white where it is transparent."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "L" else image.convert("RGB")  # Pillow converts every mode to RGB, but not to L
