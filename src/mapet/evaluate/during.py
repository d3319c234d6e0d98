"""Evaluators that the training loop calls every so many epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from mapet.data import ImageSet, PlainView
from mapet.evaluate.features import extract_features
from mapet.evaluate.probes import knn_accuracy, linear_accuracy


def probe_evaluator(
    train: ImageSet, test: ImageSet, view: PlainView, *, channels: int, workers: int = 0
) -> Callable[[nn.Module], Iterable[tuple[str, float]]]:
    """Return an evaluator that yields k-NN and linear-probe accuracy of an objective's backbone."""

    def evaluator(objective: nn.Module) -> Iterator[tuple[str, float]]:
        backbone = objective.get_submodule("backbone")
        parts = [
            extract_features(backbone, part, view, channels=channels, workers=workers) for part in (train, test)
        ]
        yield "eval_knn", knn_accuracy(*parts)
        yield "eval_linear", linear_accuracy(*parts)

    return evaluator
