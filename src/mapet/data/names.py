"""Names of image sets as users give them, checked without importing torch or NumPy."""

import os
from pathlib import Path

from mapet.errors import MapetError, nearest

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")) | frozenset(
    (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga")
)
ARRAYS = frozenset((".npy",))
DEMO_NAMES = ("mnist", "fashion-mnist")


def check_images(source: str) -> None:
    """Check that ``source`` is a folder, a file or the name of a demo set; its content is not read.

    Raises:
        MapetError: if it is none of them.
    """
    # os.path, not pathlib: pathlib raises an error for a name that is too long for a file.
    if not (is_folder(source) or os.path.isfile(source) or source in DEMO_NAMES):  # noqa: PTH113
        raise MapetError(
            f"{source!r} is neither a folder of images, nor an image, nor a text file of paths, nor a demo set "
            f"({', '.join(DEMO_NAMES)}){nearest(source, DEMO_NAMES)}"
        )


def check_labelled(source: str) -> None:
    """Check that ``source`` is a folder or the name of a demo set; its content is not read.

    Raises:
        MapetError: if it is neither.
    """
    if not (is_folder(source) or source in DEMO_NAMES):
        raise MapetError(
            f"{source!r} is neither a folder with one subfolder per class nor a demo set ({', '.join(DEMO_NAMES)})"
            f"{nearest(source, DEMO_NAMES)}"
        )


def is_folder(source: str) -> bool:
    """Return whether ``source`` names a folder; False, not an error, for a name that no file can have."""
    return os.path.isdir(Path(source))  # noqa: PTH112
