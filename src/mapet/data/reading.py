"""What stored images are read as: channels, the meaning of deep values, and how large an image may be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from mapet.config.base import Measured
from mapet.config.keys import MAX_BYTES, MAX_PIXELS, DataKeys, InputKeys

Range = tuple[float, float]
# A value range that leaves values as they are stored, to measure them.
UNSCALED: Range = (-math.inf, math.inf)


def as_range(values: Sequence[float] | Measured | None) -> Range | None:
    """Return settled numbers of a value range, or None."""
    assert not isinstance(values, Measured)
    return None if values is None else (float(values[0]), float(values[1]))


def check_bytes(size: int, max_bytes: int) -> None:
    """Raise ValueError if an image takes too many bytes."""
    if size > max_bytes:
        raise ValueError(f"{size} bytes are more than --max-bytes {max_bytes}")


@dataclass(frozen=True)
class Reading:
    """What images are read as; an image is damaged if it cannot be read so.

    Args:
        channels: ``C``. Grey images become RGB and RGB images grey, others must have ``C`` channels.
        value_range: of images with more than 8 bits: the values that become 0 and 1. None: each image is stretched
            from its least to its greatest value.
        max_pixels: most rows times columns.
        max_bytes: most bytes as stored.
    """

    channels: int
    value_range: Range | None = None
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES

    @classmethod
    def of(cls, config: InputKeys) -> Self:
        """Return what a settled configuration says."""
        return cls(config.channels, as_range(config.value_range)).within(config)

    def within(self, config: DataKeys) -> Self:
        """Return the same with the limits of a configuration."""
        return replace(self, max_pixels=config.max_pixels, max_bytes=config.max_bytes)

    def check_pixels(self, rows: int, columns: int) -> None:
        """Raise ValueError if an image has no pixels or too many."""
        if rows < 1 or columns < 1:
            raise ValueError(f"it has {rows} rows and {columns} columns")
        if rows * columns > self.max_pixels:
            raise ValueError(f"{rows} x {columns} pixels are more than --max-pixels {self.max_pixels}")

    def check_channels(self, channels: int) -> None:
        """Raise ValueError if an image with so many channels cannot be converted."""
        if channels != self.channels and not {channels, self.channels} <= {1, 3}:
            raise ValueError(f"it has {channels} channel(s) instead of {self.channels}")

    def finished(self, image: Tensor) -> Tensor:
        """Return a stored ``(c, H, W)`` image as ``(C, H, W)``: uint8 as it is, floats scaled to [0, 1].

        Raises:
            ValueError: if the channels do not fit, or a value is not finite.
        """
        self.check_channels(len(image))
        if image.is_floating_point():
            image = self._scaled(image)
        if len(image) == self.channels:
            return image
        return rgb_to_grayscale(image, num_output_channels=self.channels)  # type: ignore[no-any-return]

    def _scaled(self, values: Tensor) -> Tensor:
        if not bool(values.isfinite().all()):
            raise ValueError("the image contains NaN or infinity")
        if self.value_range == UNSCALED:
            return values
        low, high = values.aminmax() if self.value_range is None else torch.tensor(self.value_range)
        if not bool((high - low).isfinite()):
            raise ValueError(f"the values from {low:g} to {high:g} are too far apart for float32")
        if self.value_range is not None:
            values = values.clamp(low, high)
        return (values - low) / (high - low) if high > low else torch.zeros_like(values)
