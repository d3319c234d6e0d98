"""Linear probe: softmax regression on standardised features."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mapet.probes.features import Features, FloatArray
from mapet.probes.heads import Setting, Training, cross_entropy

CHUNK = 8192  # images at a time
DAMPING = 1e-2  # added to the variances (1 on average) that the whitening divides by
CONSTANT = 1e-12  # a feature is constant if its variance is below this share of its mean square


class LinearHeads(nn.Module):
    """One linear head for each setting, all on the same whitened features.

    Args:
        mean: ``(D,)``, subtracted from the features.
        whiten: ``(D, D)``, the centred features are multiplied by it.
        heads: number of heads.
        classes: number of classes.
    """

    mean: Tensor
    whiten: Tensor

    def __init__(self, mean: Tensor, whiten: Tensor, heads: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("whiten", whiten)
        self.weight = nn.Parameter(torch.zeros(heads, classes, whiten.shape[1]))
        self.bias = nn.Parameter(torch.zeros(heads, classes))

    def prepare(self, x: Tensor) -> Tensor:
        """Return ``(B, D)`` whitened features."""
        return (x - self.mean) @ self.whiten

    def logits(self, prepared: Tensor) -> Tensor:
        """Return ``(B, heads, C)`` logits of whitened features."""
        products: Tensor = prepared @ self.weight.flatten(0, 1).T
        return products.view(-1, *self.bias.shape) + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, heads, C)`` logits of ``(B, D)`` features."""
        return self.logits(self.prepare(x))


def fit_linear(features: Features, settings: Sequence[Setting], training: Training) -> LinearHeads:
    """Train a linear head for each setting on the same batches, by SGD with momentum and a cosine schedule.

    Each head minimises the loss of logistic regression on standardised features: the mean cross-entropy plus half the
    weight decay times the squared weights (``weight_decay = 1 / (C n)`` for scikit-learn's ``C``). The weights are
    expressed in the principal directions of the features, scaled to similar variance: without that, directions of
    small variance need tens of thousands of steps.
    """
    mean, deviation, variances, directions = principal(features)
    # The damping is not below the weight decay, so that the penalty is never the steepest part of the loss.
    scale = 1 / (variances + max(DAMPING, *(setting.weight_decay for setting in settings)))
    whiten = torch.from_numpy(directions * np.sqrt(scale) / deviation[:, None]).float()
    heads = LinearHeads(torch.from_numpy(mean).float(), whiten, len(settings), len(features.classes))
    heads.to(training.device)
    # A squared weight in a principal direction, times its scale, is the squared weight on standardised features.
    penalty_scale = torch.from_numpy(scale).float().to(training.device)
    lr = torch.tensor([setting.lr for setting in settings], device=training.device)
    decay = torch.tensor([setting.weight_decay for setting in settings], device=training.device)
    # One optimiser trains all heads: its learning rate is 1, and each head's loss is multiplied by its own.
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps_for(len(features)))
    for x, y in training.batches(whitened(features, heads)):
        data_loss = cross_entropy(heads.logits(x), y).mean(0)
        penalty = decay / 2 * (heads.weight.square() * penalty_scale).sum((1, 2))
        optimizer.zero_grad()
        (lr * (data_loss + penalty)).sum().backward()
        optimizer.step()
        schedule.step()
    return heads.eval()


def principal(features: Features) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return the principal directions of standardised features, computed in float64.

    Returns:
        ``(D,)`` means and ``(D,)`` standard deviations of the features (1 for a constant feature), ``(D,)`` variances
        of the standardised features in the principal directions, and ``(D, D)`` directions, one in each column.
    """
    width = features.store.shape[1]
    total, products = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(features), CHUNK):
        x = features.take(slice(start, start + CHUNK))[0].astype(np.float64)
        total += x.sum(axis=0)
        products += x.T @ x
    mean = total / len(features)
    covariance = products / len(features) - np.outer(mean, mean)
    variance = covariance.diagonal()
    deviation = np.sqrt(np.where(variance > CONSTANT * (mean**2 + variance), variance, 1.0))
    variances, directions = np.linalg.eigh(covariance / np.outer(deviation, deviation))
    return mean, deviation, variances.clip(min=0), directions


@torch.no_grad()
def whitened(features: Features, heads: LinearHeads) -> Features:
    """Return the whitened features, so that they are computed once and not at every step."""
    store = np.empty((len(features), heads.weight.shape[2]), dtype=np.float32)
    for start in range(0, len(features), CHUNK):
        chunk = slice(start, start + CHUNK)
        store[chunk] = heads.prepare(torch.from_numpy(features.take(chunk)[0]).to(heads.weight.device)).cpu().numpy()
    return Features(store, np.arange(len(features)), features.y, features.classes)
