"""What networks give for labelled images: outputs, frozen features, and scores of predicted classes."""

import errno
import os
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from mapet.data.reading import Reading
from mapet.data.sources import ImageSet
from mapet.data.views import View
from mapet.errors import MapetError
from mapet.inference.streaming import check_finite, stream

FloatArray = np.ndarray[Any, np.dtype[Any]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]
Network = Callable[[Tensor], Tensor]  # from normalised ``(B, C, H, W)`` images to ``(B, ...)``
Show = Callable[[int], None]  # called with the amount of work done
FOLDS = 5  # one fold is held out
MOST_GUESSES = 5


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

    def subset(self, indices: IntArray) -> Self:
        """Return the given images; the store is not copied."""
        return replace(self, rows=self.rows[indices], y=self.y[indices])


def stream_labelled(
    network: Network, images: ImageSet, view: View, reading: Reading, *, show: Show = lambda done: None, **options: Any
) -> Iterator[tuple[IntArray, Tensor]]:
    """Yield ``(labels, output in float32)`` of each batch, in the order of the images; damaged images are left out.

    Args:
        network: maps normalised ``(B, C, H, W)`` images to ``(B, ...)``.
        images: labelled images.
        view, reading: see ``inference.streaming.stream``.
        show: called with the number of images that are done.
        options: ``device``, ``batch_size``, ``workers``, ``precision`` and ``tally`` of ``inference.streaming.stream``.

    Raises:
        MapetError: if the output contains NaN or infinity, or too many images are damaged.
    """
    assert images.labels is not None
    labels, done = np.asarray(images.labels, dtype=np.int64), 0
    for indices, output in stream(network, images, view, reading, **options):
        check_finite(output, [images.keys[i] for i in indices.tolist()], "the network's output")
        yield labels[indices.numpy()], output.float()
        done += len(indices)
        show(done)


def extract_features(
    network: Network, images: ImageSet, view: View, reading: Reading, *, file: Path | None = None, **options: Any
) -> Features:
    """Compute the features of labelled images; damaged images are left out.

    Args:
        network: maps normalised ``(B, C, H, W)`` images to features ``(B, ...)``.
        images: labelled images.
        view, reading: see ``inference.streaming.stream``.
        file: stores the features on disk in float16; None: they are kept in memory in float32.
        options: ``show`` and the options of ``stream_labelled``.

    Raises:
        MapetError: if a feature is NaN or infinite, too many images are damaged, or the disk is too small.
    """

    def stored(inputs: Tensor) -> Tensor:
        return network(inputs).to(torch.float32 if file is None else torch.float16)

    store, y, done = np.empty(0), np.empty(len(images), dtype=np.int64), 0
    for labels, output in stream_labelled(stored, images, view, reading, **options):
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


@dataclass(frozen=True)
class Scores:
    """Scores of the predicted classes of test images.

    Attributes:
        classes: names of the ``C`` classes.
        accuracy: share of images in 0..1 whose most probable class is the true one.
        top5: share of images in 0..1 whose true class is among the five most probable; None for five classes or fewer.
        confusion: ``(C, C)`` numbers of images: rows are true classes, columns predicted classes.
    """

    classes: tuple[str, ...]
    accuracy: float
    top5: float | None
    confusion: IntArray


def accuracy(truth: IntArray, guesses: IntArray) -> float:
    """Return the share of images in 0..1 whose most probable class is the true one; see ``score``."""
    return float((guesses[:, 0] == truth).mean())


def score(truth: IntArray, guesses: IntArray, classes: Sequence[str]) -> Scores:
    """Score predicted classes.

    Args:
        truth: ``(n,)`` class indices.
        guesses: ``(n, min(5, C))`` class indices, the most probable first.
        classes: names of the ``C`` classes.
    """
    from sklearn.metrics import confusion_matrix  # imported here: it takes as long as torch

    return Scores(
        tuple(classes),
        accuracy(truth, guesses),
        float((guesses == truth[:, None]).any(axis=1).mean()) if len(classes) > MOST_GUESSES else None,
        confusion_matrix(truth, guesses[:, 0], labels=range(len(classes))),
    )


def score_classifier(network: nn.Module, images: ImageSet, view: View, reading: Reading, **options: Any) -> Scores:
    """Score a classifier on labelled images; damaged images are left out.

    Args:
        network: gives ``(B, C)`` logits; it is put into evaluation mode.
        images: labelled with the classes of the network, in its order.
        view, reading: see ``inference.streaming.stream``.
        options: ``show`` and the options of ``stream_labelled``.

    Raises:
        MapetError: if the logits contain NaN or infinity, or too many images are damaged.
    """
    truth, guesses = [], []
    for labels, logits in stream_labelled(network.eval(), images, view, reading, **options):
        truth.append(labels)
        guesses.append(logits.topk(min(MOST_GUESSES, logits.shape[1])).indices.cpu().numpy())
    return score(np.concatenate(truth), np.concatenate(guesses), images.classes)


def summarise(scores: Sequence[Scores]) -> dict[str, Any]:
    """Return the scores of several seeds as one JSON object; see ``evaluate`` for the keys.

    ``per_class`` is the accuracy in 0..1 of each class, None for a class without images.
    """
    confusion = np.sum([one.confusion for one in scores], axis=0)
    accuracies = [one.accuracy for one in scores]
    tops = [one.top5 for one in scores if one.top5 is not None]
    of_classes = zip(scores[0].classes, confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), strict=True)
    return {
        "accuracy": statistics.mean(accuracies),
        **({"least": min(accuracies), "greatest": max(accuracies)} if len(scores) > 1 else {}),
        "top5": statistics.mean(tops) if tops else None,
        "per_class": {name: right / images if images else None for name, right, images in of_classes},
        "confusion": confusion.tolist(),
    }
