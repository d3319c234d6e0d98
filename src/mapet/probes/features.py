"""Network outputs and frozen features of labelled images."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mapet.data.sources import ImageSet
from mapet.data.views import View
from mapet.errors import MapetError
from mapet.inference.finite import check_finite
from mapet.inference.streaming import stream
from mapet.probes.metrics import IntArray

FloatArray = np.ndarray[Any, np.dtype[Any]]
Network = Callable[[Tensor], Tensor]  # from normalised ``(B, C, H, W)`` images to ``(B, ...)``
FOLDS = 5  # one fold is held out


@dataclass(frozen=True)
class Features:
    """Features of ``n`` labelled images.

    Attributes:
        store: ``(N, ...)`` features in memory or on disk; subsets share it.
        rows: ``(n,)`` indices of the images in the store.
        y: ``(n,)`` class indices.
        classes: names of the classes.
    """

    store: FloatArray
    rows: IntArray
    y: IntArray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def x(self) -> FloatArray:
        """All features, ``(n, ...)``, in memory."""
        return self.store[self.rows]

    def take(self, indices: IntArray | slice) -> tuple[FloatArray, IntArray]:
        """Return features and class indices of the given images, in memory."""
        return self.store[self.rows[indices]], self.y[indices]

    def subset(self, indices: IntArray) -> Features:
        """Return the given images; the store is not copied."""
        return Features(self.store, self.rows[indices], self.y[indices], self.classes)


def stream_labelled(
    network: Network,
    images: ImageSet,
    view: View,
    channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    show: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> Iterator[tuple[IntArray, Tensor]]:
    """Yield ``(labels, output)`` of each batch, in the order of the images; damaged images are left out.

    Args:
        network: maps normalised ``(B, C, H, W)`` images to ``(B, ...)``.
        images: labelled images.
        view, channels: see ``inference.stream``.
        dtype: of the output.
        show: called with the number of images done.
        options: ``device``, ``batch_size``, ``workers``, ``precision`` and ``tally`` of ``inference.stream``.

    Raises:
        MapetError: if the output contains NaN or infinity, or too many images are damaged.
    """
    assert images.labels is not None
    labels, done = np.asarray(images.labels, dtype=np.int64), 0
    for indices, output in stream(network, images, view, channels, **options):
        output = output.float().to(dtype)
        check_finite(output, [images.keys[i] for i in indices.tolist()], "the network's output")
        yield labels[indices.numpy()], output
        done += len(indices)
        show(done)


def extract_features(
    network: Network, images: ImageSet, view: View, channels: int, *, file: Path | None = None, **options: Any
) -> Features:
    """Compute the features of labelled images; damaged images are left out.

    Args:
        network: maps normalised ``(B, C, H, W)`` images to features ``(B, ...)``.
        images: labelled images.
        view, channels: see ``inference.stream``.
        file: stores the features on disk in float16; None: they are kept in memory in float32.
        options: ``show`` and the options of ``stream_labelled``.

    Raises:
        MapetError: if a feature is NaN or infinite, too many images are damaged, or the disk is too small.
    """
    store, y = np.empty(0), np.empty(len(images), dtype=np.int64)
    dtype, done = torch.float32 if file is None else torch.float16, 0
    for labels, output in stream_labelled(network, images, view, channels, dtype=dtype, **options):
        if not done:
            shape = (len(images), *output.shape[1:])
            store = np.empty(shape, np.float32) if file is None else allocate_on_disk(file, shape)
        batch = slice(done, done + len(labels))
        store[batch], y[batch] = output.cpu().numpy(), labels
        done += len(labels)
    return Features(store, np.arange(done), y[:done], images.classes)


def allocate_on_disk(file: Path, shape: tuple[int, ...]) -> FloatArray:
    """Return a float16 array in a new file; raise MapetError if the disk has no room for it."""
    size = 2 * int(np.prod(shape))
    # A full disk kills a process that writes to a mapped file, without a message: allocate the space before.
    try:
        if size > shutil.disk_usage(file.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with file.open("wb") as fresh:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fresh.fileno(), 0, size)
        return np.memmap(file, np.float16, "r+", shape=shape)
    except OSError as error:
        raise MapetError(
            f"the features need {size / 2**30:.2g} GiB in the temporary folder {file.parent}, which has no room for "
            f"them ({error.strerror}); set TMPDIR to a larger disk, or use a smaller --image-size"
        ) from error


def hold_out(y: IntArray, seed: int) -> tuple[IntArray, IntArray]:
    """Split training images class by class: the indices of four fifths, and of the fifth that chooses the settings.

    Args:
        y: ``(n,)`` class indices.
        seed: decides which images are held out.

    Raises:
        MapetError: if there is only one class, or a single image of every class.
    """
    from sklearn.model_selection import StratifiedKFold  # imported here: it takes as long as torch

    counts = np.bincount(y)
    if np.count_nonzero(counts) < 2:
        raise MapetError(f"the {len(y)} training images that can be read are of one class; repair or add images")
    if counts.max() < 2:
        raise MapetError("each class has a single training image, so no image can be held out; add images")
    folds = StratifiedKFold(min(FOLDS, int(counts.max())), shuffle=True, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes with fewer images than folds are allowed
        rest, held_out = next(iter(folds.split(y, y)))
    return rest, held_out
