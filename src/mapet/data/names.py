"""Names of image sets as users give them, checked without importing torch or NumPy."""

import os
from pathlib import Path

from mapet.errors import MapetError, nearest

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")) | frozenset(
    (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga")
)
ONE_ARRAY = frozenset((".npy",))  # ending of an image that is an array
ARRAYS, TABLES, TAR, INDEX = (".npy", ".npz"), (".parquet", ".arrow"), ".tar", ".index"
SEVERAL_IMAGES = frozenset((*ARRAYS, *TABLES, TAR, INDEX))  # endings of files that hold more than one image
HUGGING_FACE, BUCKET, GIVEN = "hf:", "s3://", "python:"
DEMO_NAMES = ("mnist", "fashion-mnist")


def check_images(source: str) -> None:
    """Check that ``source`` is a folder, a file, the name of a demo set, or begins with ``hf:`` or ``s3://``.

    Nothing is read.

    Raises:
        MapetError: if it is none of them.
    """
    _refuse_given(source)
    # os.path, not pathlib: pathlib raises an error for a name that is too long for a file.
    if not (is_folder(source) or os.path.isfile(source) or is_elsewhere(source) or source in DEMO_NAMES):  # noqa: PTH113
        raise MapetError(
            f"{source!r} is neither a folder of images, nor an image, nor a text file of paths, nor another file of "
            f"images ({' '.join(sorted(SEVERAL_IMAGES))}), nor a demo set ({', '.join(DEMO_NAMES)}), nor does it begin "
            f"with {HUGGING_FACE} or {BUCKET}{nearest(source, DEMO_NAMES)}"
        )


def check_labelled(source: str) -> None:
    """Check that ``source`` may hold labelled images; nothing is read.

    Raises:
        MapetError: if it does not.
    """
    _refuse_given(source)
    is_file = ending(source) in SEVERAL_IMAGES and os.path.isfile(source)  # noqa: PTH113
    if not (is_folder(source) or is_file or is_elsewhere(source) or source in DEMO_NAMES):
        raise MapetError(
            f"{source!r} is neither a folder with one subfolder per class nor a demo set ({', '.join(DEMO_NAMES)}), "
            f"nor another source with labels{nearest(source, DEMO_NAMES)}"
        )


def is_folder(source: str) -> bool:
    """Return whether ``source`` names a folder; False, not an error, for a name that no file can have."""
    return os.path.isdir(Path(source))  # noqa: PTH112


def is_elsewhere(source: str) -> bool:
    """Return whether ``source`` is a Hugging Face data set, or lies in a bucket."""
    return source.startswith((HUGGING_FACE, BUCKET))


def ending(source: str) -> str:
    """Return the ending of a name in lower case, with its dot."""
    return os.path.splitext(source)[1].lower()  # noqa: PTH122


def _refuse_given(source: str) -> None:
    if source.startswith(GIVEN):
        raise MapetError(
            f"the images {source!r} were a data set given from Python; give it again: "
            "mapet.pretrain({'data': dataset}, out, resume=True)"
        )
