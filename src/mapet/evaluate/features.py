"""Frozen features of labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mapet.data import DamageTally, ImageSet, PlainView, ViewDataset, in_order, load_batches
from mapet.errors import MapetError

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Features:
    """``(n, d)`` float32 features and ``(n,)`` labels."""

    x: FloatArray
    y: IntArray


@torch.no_grad()
def extract_features(
    model: nn.Module, images: ImageSet, view: PlainView, *, channels: int, batch_size: int = 256, workers: int = 0
) -> Features:
    """Run a frozen model over labelled images, in order; its output is the feature, flattened.

    Args:
        model: maps normalised ``(B, C, H, W)`` images to ``(B, ...)``; put into evaluation mode meanwhile.
        images: labelled; images that cannot be read are left out.
        view: the plain view.
        channels: of the images.
        batch_size: images at a time.
        workers: processes that load images.

    Raises:
        MapetError: if the images have no labels or none can be read.
    """
    if images.labels is None:
        raise MapetError(f"{images.name} has no labels; evaluation needs one subfolder per class")
    device = next(iter(model.parameters()), torch.empty(0)).device
    loader = load_batches(ViewDataset(images, view, channels), in_order(len(images), batch_size), workers)
    labels = torch.tensor(images.labels)
    tally = DamageTally(images, most_share=1.0)
    training = model.training
    model.eval()
    features, kept = [], []
    for batch in loader:
        tally.add(batch["damaged"])
        # A damaged file's stand-in must not be counted twice: only images that are themselves stay.
        whole = torch.tensor([not met for met in batch["damaged"]])
        features.append(model(batch["student"][whole].to(device)).flatten(1).float().cpu())
        kept.append(labels[batch["index"][whole]])
    model.train(training)
    x, y = torch.cat(features).numpy(), torch.cat(kept).numpy()
    if len(np.unique(y)) < 2:
        raise MapetError(f"of the labelled images of {images.name} only {len(y)} of one class can be read; repair them")
    return Features(x, y)
