"""Images given from Python, as a map-style ``torch.utils.data.Dataset``."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from mapet.data.names import GIVEN
from mapet.data.sources import ImageSet, Source
from mapet.errors import MapetError


@dataclass(frozen=True, eq=False)
class Items(Source):
    """The items of a data set, images or ``(image, ...)``; their keys are "0", "1", ..."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def key(self, index: int) -> str:
        """Return the number of an item."""
        return str(index)

    def content(self, index: int, max_bytes: int) -> bytes:
        """Return an image as an uncompressed TIFF file, which holds every mode of Pillow's."""
        item = self.dataset[index]
        file = BytesIO()
        to_pil(item[0] if isinstance(item, tuple | list) else item).save(file, "TIFF")
        return file.getvalue()


def to_pil(image: Any) -> Image.Image:
    """Return a Pillow image of a Pillow image, an array ``(H, W[, C])``, or a tensor ``(C, H, W)`` or ``(H, W)``.

    Raises:
        TypeError, ValueError: for other types and shapes, and for numbers outside of uint8 or of floats in [0, 1].
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"an item is a {type(image).__name__}, not a Pillow image, an array or a tensor")
    if image.is_floating_point() and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError("a tensor of floats has values outside of [0, 1]; leave normalisation to mapet")
    pixels: Image.Image = v2.functional.to_pil_image(v2.functional.to_dtype(image, torch.uint8, scale=True))
    return pixels


def given_images(values: Mapping[str, Any]) -> tuple[dict[str, Any], ImageSet | None]:
    """Take a data set out of the values of a job, where ``data`` may be one instead of a name.

    Returns:
        the values with a name, and the images; None if ``data`` is no data set.

    Raises:
        MapetError: if the data set is empty, or has no length.
    """
    dataset = values.get("data")
    if isinstance(dataset, ImageSet):
        images = dataset
    elif hasattr(dataset, "__getitem__") and not isinstance(dataset, str):
        images = ImageSet(f"{GIVEN}{type(dataset).__name__}", Items(dataset))
    else:
        return dict(values), None
    try:
        count = len(images)
    except TypeError:
        count = 0
    if count == 0:
        raise MapetError(f"the data set {images.name} is empty or has no length; pre-training draws images by number")
    return {**values, "data": images.name}, images
