"""How well a network with a classifier does on labelled images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from mapet.data.batches import DamageTally
from mapet.data.sources import ImageSet
from mapet.data.views import View
from mapet.errors import MapetError
from mapet.inference.streaming import stream
from mapet.probes.metrics import MOST_GUESSES, Scores, score


def score_classifier(
    network: nn.Module,
    images: ImageSet,
    view: View,
    channels: int,
    *,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "no",
    tally: DamageTally | None = None,
    show: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Score a classifier on labelled images.

    Args:
        network: gives ``(B, C)`` logits; put into evaluation mode, and left in it.
        images: labelled by the network's classes, ``images.classes``, in its order (see ``data.with_classes``); images
            that cannot be read are left out.
        view, channels, device, batch_size, workers, precision, tally: see ``inference.stream``.
        show: is told how many images are done.

    Raises:
        MapetError: if the images have no labels, or the network gives other than finite numbers.
    """
    if images.labels is None:
        raise MapetError(f"{images.name} has no labels; give a folder with one subfolder per class")
    labels = np.asarray(images.labels, dtype=np.int64)
    truth, guesses, done = [], [], 0
    batches = stream(
        network.eval(),
        images,
        view,
        channels,
        device=device,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        tally=tally,
    )
    for indices, logits in batches:
        wrong = ~logits.isfinite().all(dim=1)
        if wrong.any():
            raise MapetError(
                f"the network's output for image {images.keys[int(indices[int(wrong.long().argmax())])]!r} in "
                f"{images.name} contains NaN or infinity; take another --precision, or weights that are sound"
            )
        guesses.append(logits.float().topk(min(MOST_GUESSES, logits.shape[1])).indices.cpu().numpy())
        truth.append(labels[indices.numpy()])
        done += len(indices)
        show(done)
    return score(np.concatenate(truth), np.concatenate(guesses), images.classes)
