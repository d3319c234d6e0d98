"""What is said of predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

MOST_GUESSES = 5

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Scores:
    """How well the classes of test images were predicted.

    Attributes:
        classes: names of the ``C`` classes.
        accuracy: share in 0..1 of the images whose first guess is right.
        top5: share whose class is among the first five guesses; None where there are no more than five classes.
        confusion: ``(C, C)`` counts of images: rows are true classes, columns predicted ones.
    """

    classes: tuple[str, ...]
    accuracy: float
    top5: float | None
    confusion: IntArray


def score(truth: IntArray, guesses: IntArray, classes: Sequence[str]) -> Scores:
    """Score guesses.

    Args:
        truth: ``(n,)`` class indices.
        guesses: ``(n, k)`` class indices, the likeliest first; ``k`` is 5, or all classes if they are fewer.
        classes: their names.
    """
    right = guesses == truth[:, None]
    return Scores(
        tuple(classes),
        float(right[:, 0].mean()),
        float(right.any(axis=1).mean()) if len(classes) > MOST_GUESSES else None,
        confusion_matrix(truth, guesses[:, 0], labels=range(len(classes))),
    )


def per_class(confusion: IntArray, classes: Sequence[str]) -> dict[str, float | None]:
    """Return accuracy in 0..1 by the name of the true class, of a confusion matrix; None without images."""
    return {
        name: float(row[number] / row.sum()) if row.sum() else None
        for number, (name, row) in enumerate(zip(classes, confusion, strict=True))
    }
