"""Whether an export gives what the model gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mapet.data.sources import ImageSet
from mapet.errors import MapetError
from mapet.inference.models import OpenModel
from mapet.inference.streaming import stream
from mapet.jobs.export.program import first_line

# Batches of 32 are cut here, into batches of 1, 3 and 28: an export must take any number of images.
BATCH_SIZE, CUTS = 32, (1, 4)


class Agreement(NamedTuple):
    """On how many images two networks were compared, and the largest absolute difference of their outputs."""

    images: int
    largest_difference: float


def compare(opened: OpenModel, exported: Callable[[Tensor], Tensor], images: ImageSet) -> Agreement:
    """Run a model and its export on images, in float32, in batches of several sizes.

    Args:
        opened: the model.
        exported: takes ``(B, C, H, W)`` as the model does, on the CPU, and should give the same.
        images: to compare on; damaged ones are left out.

    Returns:
        how well they agree; a NaN in either's output makes the difference NaN.

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
    except Exception as error:  # ONNX Runtime's own, or a guard of torch.export
        raise MapetError(f"the export cannot be run on {len(images)} images: {first_line(error)}") from error
