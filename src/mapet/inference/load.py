"""``mapet.load``: a model and the transform that makes its input, for use in Python."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mapet.data.decode import decode, from_pil
from mapet.data.npy import from_array
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.errors import MapetError
from mapet.inference.models import class_names, open_model


@dataclass(frozen=True)
class ImageTransform:
    """Make the normalised ``(C, H, W)`` input of a model from an image, exactly as every command does.

    Args:
        view: makes the input.
        reading: what images are read as.
    """

    view: PlainView
    reading: Reading

    def __call__(self, image: str | Path | Image.Image | NDArray[Any]) -> Tensor:
        """Transform a file, a Pillow image, or an ``(H, W)`` or ``(H, W, C)`` uint8 array.

        Where the model has a value range, arrays may hold other numbers too.

        Raises:
            MapetError: for a file that cannot be read, or another kind of object.
        """
        return self.view(self._read(Path(image)) if isinstance(image, str | Path) else self._convert(image))[1]

    def _convert(self, image: Image.Image | NDArray[Any]) -> Tensor:
        try:
            if isinstance(image, Image.Image):
                return from_pil(image, self.reading)
            _check_array(image, self.reading)
            return from_array(image, self.reading)
        except ValueError as error:
            raise MapetError(
                f"the image cannot be transformed: {error}; pass one as the model was trained on"
            ) from error

    def _read(self, file: Path) -> Tensor:
        try:
            return decode(file, self.reading)
        except Exception as error:  # Pillow's plug-ins raise errors of many types on damaged files
            reason = "it is a folder" if file.is_dir() else error
            raise MapetError(f"image {str(file)!r} cannot be read ({reason}); name one undamaged image file") from error


def _check_array(image: object, reading: Reading) -> None:
    if not isinstance(image, np.ndarray):
        what = f"type {type(image).__name__}"
    elif (image.dtype != np.uint8 and reading.value_range is None) or not (
        image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, reading.channels))
    ):
        what = f"type {image.dtype} and shape {image.shape}"
    else:
        return
    raise MapetError(
        f"an image of {what} cannot be transformed; pass a path, a Pillow image, or an array of uint8 values from 0 to "
        f"255 of shape (H, W) or (H, W, {max(3, reading.channels)})"
    )


class Loaded(NamedTuple):
    """``model, transform = mapet.load(...)``."""

    model: nn.Module
    transform: ImageTransform

    def __repr__(self) -> str:
        (rows, columns), channels = self.transform.view.size, self.transform.reading.channels
        output = f"{len(self.classes)} classes" if self.classes else "features"
        return f"Loaded({type(self.model).__name__}, input {channels} x {rows} x {columns}, {output})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classifier's outputs; () without a classifier."""
        return class_names(self.model)


def load(source: str | Path, *, image_size: int | tuple[int, int] | None = None) -> Loaded:
    """Load a model and the transform that makes its input.

    Args:
        source: a run folder, an exported folder, the name of a model that comes with the package, or timm's.
        image_size: side of the input in pixels, or rows and columns; None: as it was trained.

    Returns:
        ``(model, transform)``: ``model(transform(image)[None])`` gives ``(1, classes)`` logits of a
        fine-tuned model, the ``(1, D)`` pooled feature of a pre-trained one.

    Raises:
        MapetError: if there is no such model, or it cannot be read.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    opened = open_model(source, classifier=True, image_size=size)
    return Loaded(opened.network, ImageTransform(opened.view, opened.reading))
