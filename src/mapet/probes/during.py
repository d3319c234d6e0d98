"""Evaluators that the training loop calls every so many epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

from mapet.data.sources import ImageSet
from mapet.data.views import PlainView
from mapet.probes.rows import probe_row


def probe_evaluator(
    train: ImageSet, test: ImageSet, view: PlainView, *, channels: int, workers: int = 0
) -> Callable[[nn.Module], Iterable[tuple[str, float]]]:
    """Return an evaluator that yields k-NN and linear-probe accuracy of an objective's backbone."""

    def evaluator(objective: nn.Module) -> Iterator[tuple[str, float]]:
        backbone = objective.get_submodule("backbone")
        for name, accuracy in probe_row(backbone, train, test, view, channels=channels, workers=workers).items():
            yield f"eval_{name}", accuracy

    return evaluator
