"""Accuracy, top-5 accuracy and confusion matrix of predicted classes."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_GUESSES = 5

IntArray = np.ndarray[Any, np.dtype[np.int64]]


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


def score(truth: IntArray, guesses: IntArray, classes: Sequence[str]) -> Scores:
    """Score predicted classes.

    Args:
        truth: ``(n,)`` class indices.
        guesses: ``(n, min(5, C))`` class indices, the most probable first.
        classes: names of the ``C`` classes.
    """
    from sklearn.metrics import confusion_matrix  # imported here: it takes as long as torch

    right = guesses == truth[:, None]
    return Scores(
        tuple(classes),
        float(right[:, 0].mean()),
        float(right.any(axis=1).mean()) if len(classes) > MOST_GUESSES else None,
        confusion_matrix(truth, guesses[:, 0], labels=range(len(classes))),
    )


def per_class(confusion: IntArray, classes: Sequence[str]) -> dict[str, float | None]:
    """Return the accuracy in 0..1 of each class, by name; None for a class without images."""
    return {
        name: float(row[number] / row.sum()) if row.sum() else None
        for number, (name, row) in enumerate(zip(classes, confusion, strict=True))
    }


def summarise(scores: Sequence[Scores]) -> dict[str, Any]:
    """Return the scores of several seeds as one JSON object; see ``evaluate`` for the keys."""
    confusion = np.sum([one.confusion for one in scores], axis=0)
    accuracies = [one.accuracy for one in scores]
    tops = [one.top5 for one in scores if one.top5 is not None]
    return {
        "accuracy": statistics.mean(accuracies),
        **({"least": min(accuracies), "greatest": max(accuracies)} if len(scores) > 1 else {}),
        "top5": statistics.mean(tops) if tops else None,
        "per_class": per_class(confusion, scores[0].classes),
        "confusion": confusion.tolist(),
    }
