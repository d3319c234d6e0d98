"""TIFF files with several channels: pages, which Pillow reads, and bands, for which tifffile is needed."""

import logging
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mapet.data.npy import from_array
from mapet.data.reading import Reading

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: files above 4 GiB
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277  # numbers of the tags
BANDS_FIRST, BANDS_LAST, NO_BANDS = "SYX", "YXS", "YX"  # tifffile's names of axes
GREY_MODES = ("L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")

# tifffile's complaints about damaged files would go to the terminal; the reason for damage says enough.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def decode_pages(content: bytes, reading: Reading) -> Tensor | None:
    """Return the pages of a TIFF as channels; None if it has not as many grey pages of one size and type.

    Raises:
        ValueError: if there are too many pixels, or values that are not finite.
    """
    if reading.channels == 1:
        return None
    pages = []
    # Opened anew: looking for a page changes what Pillow knows of the first one.
    with Image.open(BytesIO(content)) as opened:
        if not _are_grey(opened, reading.channels):
            return None
        for number in range(reading.channels):
            opened.seek(number)
            pages.append(np.asarray(ImageOps.exif_transpose(opened)))
    return from_array(np.stack(pages, axis=-1), reading)


def _are_grey(opened: Image.Image, count: int) -> bool:
    """Return whether there are ``count`` pages, all of one size and one grey type."""
    found = set()
    for number in range(count + 1):
        try:
            opened.seek(number)
        except Exception:  # EOFError after the last page; of damaged pages Pillow raises others
            return number == count
        found.add((opened.size, opened.mode))
        if len(found) > 1 or opened.mode not in GREY_MODES:
            return False
    return False


def loses_bands(opened: Image.Image, reading: Reading) -> bool:
    """Return whether Pillow would drop bands or bits of a TIFF that are asked for."""
    if reading.channels in (1, 3) and reading.value_range is None:
        return False  # colours of 16 bits are read as 8 bits
    tags: Any = getattr(opened, "tag_v2", {})
    samples, bits = tags.get(SAMPLES_PER_PIXEL, 1), max(tags.get(BITS_PER_SAMPLE, (1,)))
    is_plain = reading.channels in (1, 3) or samples == len(opened.getbands())
    return samples > 1 and (bits > 8 or not is_plain)


def decode_bands(content: bytes, reading: Reading) -> Tensor:
    """Decode a TIFF by tifffile: its bands, or as many single-band pages as there are channels.

    Raises:
        ImportError: if tifffile is missing.
        ValueError: or any other exception, if the file is damaged or does not fit.
    """
    try:
        from tifffile import TiffFile
    except ImportError as error:
        raise ImportError("the TIFF is damaged, or has bands that need tifffile: pip install 'mapet[tiff]'") from error
    with TiffFile(BytesIO(content)) as file:
        first, *others = _pages(file, reading.channels)
        if not others or first.axes != NO_BANDS:
            return from_array(_values(first, reading), reading)
        return from_array(np.stack([_values(page, reading) for page in (first, *others)], axis=-1), reading)


def _pages(file: Any, count: int) -> list[Any]:
    """Return all pages if there are ``count`` of them, else the first; no more than one page further is looked at."""
    pages: list[Any] = []
    try:
        for number in range(count + 1):
            pages.append(file.pages[number])
    except IndexError:
        if not pages:
            raise ValueError("the TIFF holds no image") from None
    return pages if len(pages) == count else pages[:1]


def _values(page: Any, reading: Reading) -> NDArray[Any]:
    """Return the values of a page, ``(H, W)`` or ``(H, W, C)``."""
    if page.axes not in (BANDS_FIRST, BANDS_LAST, NO_BANDS):
        raise ValueError(f"it has the axes {page.axes}, which are not those of an image")
    sizes = dict(zip(page.axes, page.shape, strict=True))
    reading.check_pixels(sizes["Y"], sizes["X"])
    reading.check_channels(sizes.get("S", reading.channels))
    values: NDArray[Any] = page.asarray(maxworkers=1)
    return np.moveaxis(values, 0, -1) if page.axes == BANDS_FIRST else values
