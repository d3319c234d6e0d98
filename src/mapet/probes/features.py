"""Frozen features of labelled images."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from mapet.data.batches import DamageTally
from mapet.data.sources import ImageSet
from mapet.data.views import View
from mapet.errors import MapetError
from mapet.inference.streaming import stream
from mapet.probes.metrics import IntArray

FloatArray = np.ndarray[Any, np.dtype[Any]]
HELD_OUT_FOLDS = 5  # one of which is held out


@dataclass(frozen=True)
class Features:
    """Features of ``n`` labelled images.

    Attributes:
        store: ``(N, ...)`` floats, perhaps on the disk, among which they are.
        rows: ``(n,)`` where.
        y: ``(n,)`` class indices.
        classes: the classes' names.
    """

    store: FloatArray
    rows: IntArray
    y: IntArray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> FloatArray:
        """All of them, ``(n, ...)``, in memory."""
        return self.store[self.rows]

    def take(self, indices: IntArray | slice) -> tuple[FloatArray, IntArray]:
        """Return features and class indices of some; of a store on the disk only these are read."""
        return self.store[self.rows[indices]], self.y[indices]

    def subset(self, indices: IntArray) -> Features:
        """Return some; the store is shared."""
        return Features(self.store, self.rows[indices], self.y[indices], self.classes)


def extract_features(
    read: Callable[[Tensor], Tensor],
    images: ImageSet,
    view: View,
    channels: int,
    *,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "no",
    tally: DamageTally | None = None,
    least_classes: int = 2,
    file: Path | None = None,
    show: Callable[[int], None] = lambda done: None,
) -> Features:
    """Run a frozen network over labelled images, in order.

    Args:
        read: maps normalised ``(B, C, H, W)`` images on ``device`` to their features ``(B, ...)``.
        images: labelled; images that cannot be read are left out.
        view, channels, device, batch_size, workers, precision, tally: see ``inference.stream``.
        least_classes: how many classes there must be images of; what only tests may have one.
        file: where features are kept, in float16, instead of in memory in float32.
        show: is told how many images are done.

    Raises:
        MapetError: if the images have no labels, too few classes can be read, a feature is not finite, or
            the disk has no room.
    """
    if images.labels is None:
        raise MapetError(f"{images.name} has no labels; evaluation needs one subfolder per class")
    x, kept = np.empty(0), np.empty(len(images), dtype=np.int64)
    done = 0
    batches = stream(
        read,
        images,
        view,
        channels,
        device=device,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        tally=tally,
    )
    for indices, output in batches:
        if not done:
            shape = (len(images), *output.shape[1:])
            x = np.empty(shape, np.float32) if file is None else _on_disk(file, shape)
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused
            found = output.float().cpu().numpy().astype(x.dtype)
        wrong = ~np.isfinite(found).reshape(len(found), -1).all(axis=1)
        if wrong.any():
            raise MapetError(
                f"the features of image {images.keys[int(indices[int(wrong.argmax())])]!r} in {images.name} contain "
                "NaN or infinity; take another --precision, or weights that are sound"
            )
        x[done : done + len(found)], kept[done : done + len(found)] = found, indices.numpy()
        done += len(found)
        show(done)
    y = np.asarray(images.labels, dtype=np.int64)[kept[:done]]
    if len(np.unique(y)) < least_classes:
        raise MapetError(f"of the labelled images of {images.name} only {done} of one class can be read; repair them")
    return Features(x, np.arange(done), y, images.classes)


def _on_disk(file: Path, shape: tuple[int, ...]) -> FloatArray:
    needed = 2 * int(np.prod(shape))
    # Reserved now: a mapped file that grows where there is no room kills the process without a word.
    try:
        free = shutil.disk_usage(file.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{free / 2**30:.1f} GiB are free")
        with file.open("wb") as fresh:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fresh.fileno(), 0, needed)
        return np.memmap(file, np.float16, "r+", shape=shape)
    except OSError as error:
        raise MapetError(
            f"the features take {needed / 2**30:.2g} GiB in the temporary folder {file.parent}, which cannot hold them "
            f"({error.strerror}); set TMPDIR to a larger disk, or take a smaller --image-size"
        ) from error


def hold_out(y: IntArray, seed: int) -> tuple[IntArray, IntArray]:
    """Split labels in two, class by class: the indices of four fifths, and of the fifth to choose settings by.

    Raises:
        MapetError: if every class has a single image.
    """
    largest = int(np.bincount(y).max())
    if largest < 2:
        raise MapetError(
            "each class has a single training image, so none can be held out to choose settings by; add images"
        )
    folds = StratifiedKFold(min(HELD_OUT_FOLDS, largest), shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds: they may lack one
        rest, held_out = next(iter(folds.split(y, y)))
    return rest, held_out
