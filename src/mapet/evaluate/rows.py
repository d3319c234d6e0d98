"""One row of a results table: what a backbone is worth by every measure at once."""

from __future__ import annotations

from torch import nn

from mapet.data import ImageSet, PlainView
from mapet.evaluate.features import extract_features
from mapet.evaluate.probes import knn_accuracy, linear_accuracy

Row = dict[str, float]


def probe_row(
    model: nn.Module, train: ImageSet, test: ImageSet, view: PlainView, *, channels: int, workers: int = 0
) -> Row:
    """Return k-NN and linear-probe accuracies in 0..1; with ``nn.Flatten()`` as the model, of raw pixels."""
    seen = extract_features(model, train, view, channels=channels, workers=workers)
    unseen = extract_features(model, test, view, channels=channels, workers=workers)
    return {"knn": knn_accuracy(seen, unseen), "linear": linear_accuracy(seen, unseen)}
