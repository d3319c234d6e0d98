"""Images in NumPy files: ``.npy``, or ``.npz`` with labels."""

from pathlib import Path
from typing import Any

import numpy as np

from mapet.data.sources import Arrays, ImageSet
from mapet.errors import MapetError, reason_of

IMAGES, LABELS = "images", "labels"


def from_array_file(file: Path) -> ImageSet:
    """Open uint8 images ``(n, H, W)`` or ``(n, H, W, 3)``; their keys are "0", "1", ...

    The array of a ``.npy`` file is memory-mapped. In a ``.npz`` file it is called ``images``, or is the only one of
    such a shape; ``labels``, if there are any, is ``(n,)`` whole numbers or text.

    Raises:
        MapetError: if the file is damaged or of another kind; objects in it are not unpickled.
    """
    try:
        opened = np.load(file, mmap_mode="r", allow_pickle=False)
        arrays = {IMAGES: opened} if isinstance(opened, np.ndarray) else dict(opened)
    except Exception as error:  # NumPy and zipfile raise errors of many types for damaged files
        raise MapetError(f"{file} cannot be read as NumPy arrays ({reason_of(error)})") from error
    images = arrays.get(IMAGES)
    if images is None:
        of_images = [array for array in arrays.values() if array.ndim in (3, 4)]
        if len(of_images) != 1:
            raise MapetError(f"{file} has the arrays {', '.join(arrays)}; call that of the images {IMAGES!r}")
        images = of_images[0]
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)):
        raise MapetError(
            f"the array of {file} is {images.dtype} {images.shape}; images are uint8 (n, H, W) or (n, H, W, 3)"
        )
    if 0 in images.shape:
        raise MapetError(f"the array of {file} is {images.shape}, so it holds no image")
    labels, classes = _read_labels(arrays[LABELS], len(images), file) if LABELS in arrays else (None, ())
    return ImageSet(str(file), Arrays(images), labels, classes)


def _read_labels(labels: np.ndarray[Any, Any], count: int, file: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise MapetError(
            f"{LABELS!r} of {file} is {labels.dtype} {labels.shape}; it must be whole numbers or text, ({count},)"
        )
    classes, numbers = np.unique(labels, return_inverse=True)
    return tuple(numbers.tolist()), tuple(map(str, classes.tolist()))
