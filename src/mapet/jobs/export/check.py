"""Compare an export with its model on images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mapet.data.sources import ImageSet
from mapet.errors import MapetError
from mapet.inference.models import OpenModel
from mapet.inference.streaming import stream
from mapet.jobs.export.program import first_line

# Batches of 32 images are cut at these indices into 1, 3 and 28 images: an export must take any number of images.
BATCH_SIZE, CUTS = 32, (1, 4)


class Agreement(NamedTuple):
    """Number of images that were compared, and the largest absolute difference between outputs."""

    images: int
    largest_difference: float


def compare(opened: OpenModel, exported: Callable[[Tensor], Tensor], images: ImageSet) -> Agreement:
    """Run a model and its export on images, in float32, in batches of several sizes.

    Args:
        opened: the model.
        exported: takes ``(B, C, H, W)`` images on the CPU, as the model does, and should return the same.
        images: to compare on; damaged images are left out.

    Returns:
        The agreement; a NaN in an output makes the difference NaN.

    Raises:
        MapetError: if the export cannot be run, or no image can be read.
    """

    def difference(batch: Tensor) -> Tensor:
        parts = [part for part in batch.tensor_split(CUTS) if len(part)]
        return torch.stack([(_run(exported, part) - opened.network(part)).abs().max() for part in parts]).max()

    found = [
        (len(indices), largest)
        for indices, largest in stream(
            difference, images, opened.view, opened.channels, device=opened.device, batch_size=BATCH_SIZE
        )
    ]
    return Agreement(sum(count for count, _ in found), float(torch.stack([largest for _, largest in found]).max()))


def _run(exported: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    try:
        return exported(images)
    except Exception as error:  # of ONNX Runtime, or a guard of torch.export
        raise MapetError(f"the export cannot be run on {len(images)} images: {first_line(error)}") from error
