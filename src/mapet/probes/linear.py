"""Linear probes: softmax regression on standardised features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mapet.probes.features import Features, FloatArray
from mapet.probes.heads import Setting, Training, cross_entropy

ROWS_AT_A_TIME = 8192
DAMPING = 1e-2  # of the whitening: directions of less variance, of 1 on average, are learned more slowly
CONSTANT = 1e-12  # a feature whose variance is this share of its square does not vary


class LinearHeads(nn.Module):
    """Linear heads of several settings over whitened features.

    Args:
        mean: ``(D,)`` that is taken off features.
        whiten: ``(D, D)`` that they are then multiplied by.
        heads: how many.
        classes: how many.
    """

    def __init__(self, mean: Tensor, whiten: Tensor, heads: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("whiten", whiten)
        self.weight = nn.Parameter(torch.zeros(heads, classes, whiten.shape[1]))
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def prepare(self, x: Tensor) -> Tensor:
        """Return ``(B, D)`` features, whitened."""
        return (x - self.get_buffer("mean")) @ self.get_buffer("whiten")

    def logits(self, prepared: Tensor) -> Tensor:
        """Return ``(B, heads, C)`` logits of whitened features."""
        products: Tensor = prepared @ self.weight.flatten(0, 1).T
        return products.view(-1, *self.bias.shape) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, heads, C)`` logits of ``(B, D)`` features."""
        return self.logits(self.prepare(x))


def fit_linear(features: Features, settings: Sequence[Setting], training: Training) -> LinearHeads:
    """Train a linear head for every setting, by SGD with momentum and a cosine, on the same batches.

    Each minimises what logistic regression does: the mean cross-entropy plus half the weight decay times the squared
    weights on standardised features (``weight_decay = 1 / (C n)`` in scikit-learn's terms). Only the way there is
    eased: weights are expressed in the features' principal directions, scaled so that all vary alike; without it
    the many directions of little variance take SGD or AdamW tens of thousands of steps.
    """
    mean, deviation, variances, directions = principal(features)
    # No less than the weight decays, so that these are never the steepest part of the loss.
    eased = 1 / (variances + max(DAMPING, *(setting.weight_decay for setting in settings)))
    whiten = torch.from_numpy(directions * np.sqrt(eased) / deviation[:, None]).float()
    heads = LinearHeads(torch.from_numpy(mean).float(), whiten, len(settings), len(features.classes))
    heads.to(training.device)
    # Squared weights on standardised features are these, times the squared weights in principal directions.
    price = torch.from_numpy(eased).float().to(training.device)
    lr = torch.tensor([setting.lr for setting in settings], device=training.device)
    decay = torch.tensor([setting.weight_decay for setting in settings], device=training.device)
    # One optimiser for all: a loss that is multiplied by the learning rate needs one of 1.
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps_for(len(features)))
    for x, y in training.batches(whitened(features, heads)):
        data_loss = cross_entropy(heads.logits(x), y).mean(0)
        penalty = decay / 2 * (heads.weight.square() * price).sum((1, 2))
        optimizer.zero_grad()
        (lr * (data_loss + penalty)).sum().backward()
        optimizer.step()
        schedule.step()
    return heads.eval()


def principal(features: Features) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return mean and standard deviation of features, and variances and directions of the standardised ones.

    All in float64: ``(D,)``, ``(D,)``, ``(D,)``, and ``(D, D)`` with a direction a column. The deviation of what does
    not vary is 1.
    """
    width = features.store.shape[1]
    total, products = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(features), ROWS_AT_A_TIME):
        part = features.take(slice(start, start + ROWS_AT_A_TIME))[0].astype(np.float64)
        total += part.sum(axis=0)
        products += part.T @ part
    mean = total / len(features)
    covariance = products / len(features) - np.outer(mean, mean)
    variance = covariance.diagonal()
    deviation = np.sqrt(np.where(variance > CONSTANT * (mean**2 + variance), variance, 1.0))
    variances, directions = np.linalg.eigh(covariance / np.outer(deviation, deviation))
    return mean, deviation, variances.clip(min=0), directions


@torch.no_grad()
def whitened(features: Features, heads: LinearHeads) -> Features:
    """Return the features as the heads' logits take them, once rather than at every step."""
    store = np.empty((len(features), heads.weight.shape[2]), dtype=np.float32)
    for start in range(0, len(features), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        x = torch.from_numpy(features.take(part)[0]).to(heads.weight.device)
        store[part] = heads.prepare(x).cpu().numpy()
    return Features(store, np.arange(len(features)), features.y, features.classes)
