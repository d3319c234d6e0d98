"""Pixel accuracy and intersection over union."""

import torch
from torch import Tensor

from mapet.jobs.segment.masks import IGNORED


class Confusion:
    """Counts of pixels by true and predicted class, and the metrics that follow from them.

    Attributes:
        counts: ``(K, K)`` int64; rows are true classes.
    """

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.long)

    def add(self, truth: Tensor, prediction: Tensor) -> None:
        """Count the pixels of an image that have a class; both arguments are ``(H, W)`` int64."""
        known, classes = truth != IGNORED, len(self.counts)
        pairs = truth[known] * classes + prediction[known]
        self.counts += torch.bincount(pairs, minlength=classes**2).unflatten(0, (classes, classes))

    @property
    def pixel_accuracy(self) -> float:
        """Share in 0..1 of the pixels whose class is predicted."""
        return float(self.counts.diagonal().sum() / self.counts.sum())

    @property
    def iou_per_class(self) -> list[float | None]:
        """Intersection over union of each class in 0..1; None for a class that is neither true nor predicted."""
        intersections = self.counts.diagonal()
        unions = self.counts.sum(0) + self.counts.sum(1) - intersections
        return [float(i) / float(u) if u else None for i, u in zip(intersections, unions, strict=True)]

    @property
    def miou(self) -> float:
        """Mean of the intersections over unions, without the classes where it is None."""
        known = [value for value in self.iou_per_class if value is not None]
        return sum(known) / len(known)
