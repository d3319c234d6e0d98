"""Images in NumPy's ``.npy`` files: one array each, never a pickle."""

from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from mapet.data.reading import Reading

MAGIC = npy.MAGIC_PREFIX
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def decode_npy(content: bytes, reading: Reading) -> Tensor:
    """Decode the bytes of an ``.npy`` file; see ``from_array``. The header is checked before the values are touched.

    Raises:
        ValueError: if the file is damaged or holds no such array.
    """
    stream = BytesIO(content)
    read_header = HEADERS.get(npy.read_magic(stream))
    if read_header is None:
        raise ValueError("it has another version of the .npy format than 1.0 and 2.0")
    shape, in_columns, dtype = read_header(stream)
    _check(shape, dtype, reading)
    start = stream.tell()
    expected, found = int(np.prod(shape, dtype=object)) * dtype.itemsize, len(content) - start
    if found != expected:
        raise ValueError(f"the array has {found} bytes instead of {expected}")
    values = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if in_columns else "C")
    return from_array(values, reading)


def from_array(values: NDArray[Any], reading: Reading) -> Tensor:
    """Return an array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` as ``(C, H, W)``; see ``Reading.finished``.

    uint8 values are those of an 8-bit image; other numbers are scaled. Where both ends could be channels, the last is.

    Raises:
        ValueError: if the array has another type or shape, or values that are not finite.
    """
    _check(values.shape, values.dtype, reading)
    if values.ndim == 3:
        values = np.moveaxis(values, _channel_axis(values.shape, reading.channels), 0)
    if values.dtype != np.uint8:
        with np.errstate(over="ignore"):  # what overflows becomes infinite, which is refused
            values = values.astype(np.float32)
    return reading.finished(torch.tensor(values[None] if values.ndim == 2 else values))


def _check(shape: tuple[int, ...], dtype: np.dtype[Any], reading: Reading) -> None:
    if dtype.kind not in "uif":
        raise ValueError(f"it holds values of type {dtype}, not numbers")
    if len(shape) not in (2, 3):
        raise ValueError(f"it has the shape {shape}; an image is (H, W), (H, W, C) or (C, H, W)")
    sides, channels = list(shape), 1
    if len(shape) == 3:
        channels = sides.pop(_channel_axis(shape, reading.channels))
    reading.check_channels(channels)
    reading.check_pixels(*sides)


def _channel_axis(shape: tuple[int, ...], channels: int) -> int:
    """Return the axis of the channels, last or first: the asked number is looked for first, then grey or RGB."""
    wanted = [(count, axis) for count in (channels, 1, 3) for axis in (2, 0)]
    return next((axis for count, axis in wanted if shape[axis] == count), 2)
