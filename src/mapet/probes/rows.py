"""One row of a results table: what a backbone is worth by every measure at once."""

from __future__ import annotations

import torch
from torch import nn

from mapet.data.sources import ImageSet
from mapet.data.views import PlainView
from mapet.jobs.evaluate.config import KNN_TEMPERATURE
from mapet.probes.features import extract_features
from mapet.probes.heads import Setting, Training, predict
from mapet.probes.knn import classify
from mapet.probes.linear import fit_linear
from mapet.probes.metrics import score

Row = dict[str, float]


# A row is for comparison, and may be made during training: settings that do for any features, and no choice of them.
NEIGHBOURS, SETTING, STEPS = 10, Setting(lr=0.3, weight_decay=1e-3), 500


def probe_row(
    model: nn.Module, train: ImageSet, test: ImageSet, view: PlainView, *, channels: int, workers: int = 0
) -> Row:
    """Return k-NN and linear-probe accuracies in 0..1; with ``nn.Flatten()`` as the model, of raw pixels.

    Args:
        model: maps normalised ``(B, C, H, W)`` images to ``(B, D)``; put into evaluation mode meanwhile.
        train, test: labelled.
        view: makes the input.
        channels: of the input.
        workers: processes that load images.
    """
    device = next(iter(model.parameters()), torch.empty(0)).device
    training = model.training
    model.eval()
    seen, unseen = (
        extract_features(model, part, view, channels, device=device, workers=workers, least_classes=least)
        for part, least in ((train, 2), (test, 1))
    )
    model.train(training)
    k = min(NEIGHBOURS, len(seen))
    nearest = classify(seen.x, seen.y, unseen.x, [k], KNN_TEMPERATURE, len(seen.classes))[k]
    probe = Training(seed=0, device=device, steps=STEPS)
    with torch.enable_grad():  # the training loop measures without
        heads = fit_linear(seen, [SETTING], probe)
    linear = predict(heads, unseen, probe)
    return {
        "knn": score(unseen.y, nearest, seen.classes).accuracy,
        "linear": score(unseen.y, linear, seen.classes).accuracy,
    }
