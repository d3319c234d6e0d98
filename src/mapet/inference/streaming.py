"""Run a network over images, in order, batch by batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mapet.config.keys import InferenceKeys
from mapet.data.batches import DamageTally, ViewDataset, in_order, load_batches
from mapet.data.reading import Reading
from mapet.data.sources import ImageSet
from mapet.data.views import View
from mapet.engine.parallel import count_workers
from mapet.errors import MapetError
from mapet.inference.models import OpenModel

Output = TypeVar("Output")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network runs in "no" (float32), "bf16" or "fp16"."""
    return torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision in PRECISIONS)


def stream(
    network: Callable[[Tensor], Output],
    images: ImageSet,
    view: View,
    reading: Reading,
    *,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "no",
    tally: DamageTally | None = None,
) -> Iterator[tuple[Tensor, Output]]:
    """Yield ``(indices, output)`` of each batch, in order; memory does not grow with the number of images.

    Args:
        network: takes normalised ``(B, C, H, W)`` images on ``device``.
        images: labels are not used.
        view: makes the input, which is its second output.
        reading: what images are read as.
        device: where the network is.
        batch_size: images at a time.
        workers: processes that load images.
        precision: "no" (float32), "bf16" or "fp16".
        tally: counts and logs the images that cannot be read, which are left out; None: any number may be damaged.

    Raises:
        MapetError: if more images are damaged than ``tally`` allows, or none can be read.
    """
    tally = tally or DamageTally(images, most_share=1.0)
    for batch in load_batches(ViewDataset(images, view, reading), in_order(len(images), batch_size), workers, device):
        tally.add(batch["damaged"])
        # Another image stands in for a damaged one; only undamaged images are kept.
        whole = torch.tensor([not met for met in batch["damaged"]])
        if not whole.any():
            continue
        with torch.no_grad(), autocast(device, precision):
            output = network(batch["images"][whole.to(device)])
        yield batch["index"][whole], output


def stream_options(config: InferenceKeys, opened: OpenModel, images: ImageSet) -> dict[str, Any]:
    """Return the keyword arguments of ``stream`` from a configuration; ``tally`` counts the damaged images."""
    return {
        "device": opened.device,
        "batch_size": config.batch_size,
        "workers": count_workers(config.workers, images, opened.device),
        "precision": config.precision,
        "tally": DamageTally(images, config.max_damaged),
    }


def check_finite(values: Tensor, keys: Sequence[str], what: str) -> None:
    """Raise MapetError if the ``(B, ...)`` values of a batch contain NaN or infinity.

    Args:
        values: computed for ``B`` images.
        keys: of these images, for the message.
        what: the values are, for the message.
    """
    finite = values.isfinite().reshape(len(values), -1).all(dim=1)
    if not finite.all():
        raise MapetError(
            f"{what} of image {keys[int(finite.long().argmin())]!r} contains NaN or infinity; pass --precision no (for "
            "mapet embed also --dtype float32), or use other weights"
        )
