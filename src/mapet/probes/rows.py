"""k-NN and linear-probe accuracy with fixed settings, as one row of a table or during training."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from mapet.config.keys import KNN_TEMPERATURE
from mapet.data.reading import Reading
from mapet.data.sources import ImageSet
from mapet.data.views import PlainView
from mapet.probes.fits import fit_linear
from mapet.probes.heads import Setting, Training, predict
from mapet.probes.knn import classify
from mapet.probes.labelled import accuracy, extract_features

Row = dict[str, float]

# Rows compare networks: the settings are fixed and suit any features.
NEIGHBOURS = 10
SETTING, STEPS = Setting(lr=0.3, weight_decay=1e-3), 500


def probe_row(
    network: nn.Module, train: ImageSet, test: ImageSet, view: PlainView, *, reading: Reading, workers: int = 0
) -> Row:
    """Return the k-NN and the linear-probe accuracy in 0..1, as ``knn`` and ``linear``.

    Args:
        network: maps normalised ``(B, C, H, W)`` images to ``(B, D)`` features; ``nn.Flatten()`` gives raw pixels.
            It is in evaluation mode meanwhile.
        train, test: labelled images.
        view: makes the input of the network.
        reading: what images are read as.
        workers: processes that load images.
    """
    device = next(iter(network.parameters()), torch.empty(0)).device
    was_training = network.training
    network.eval()
    seen, unseen = (
        extract_features(network, part, view, reading, device=device, workers=workers) for part in (train, test)
    )
    network.train(was_training)
    k = min(NEIGHBOURS, len(seen))
    nearest = classify(seen.x, seen.y, unseen.x, [k], KNN_TEMPERATURE, len(seen.classes))[k]
    training = Training(seed=0, device=device, steps=STEPS)
    with torch.enable_grad():  # the training loop disables gradients around its evaluators
        heads = fit_linear(seen, [SETTING], training)
    return {"knn": accuracy(unseen.y, nearest), "linear": accuracy(unseen.y, predict(heads, unseen, training))}


def probe_evaluator(
    train: ImageSet, test: ImageSet, view: PlainView, *, reading: Reading, workers: int = 0
) -> Callable[[nn.Module], Iterable[tuple[str, float]]]:
    """Return a function that measures a network; it gives ``eval_knn`` and ``eval_linear``, see ``probe_row``."""

    def evaluate(network: nn.Module) -> list[tuple[str, float]]:
        row = probe_row(network, train, test, view, reading=reading, workers=workers)
        return [(f"eval_{name}", accuracy) for name, accuracy in row.items()]

    return evaluate
