"""The linear probe, a softmax regression on standardised features, and the attentive probe: heads and their fit."""

from collections.abc import Sequence

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from mapet.data.augment import seeded
from mapet.data.seeds import Stream, fold_seed
from mapet.probes.heads import Setting, Training, cross_entropy
from mapet.probes.labelled import Features, FloatArray

CHUNK = 8192  # images at a time
DAMPING = 1e-2  # added to the variances (1 on average) that the whitening divides by
CONSTANT = 1e-12  # a feature is constant if its variance is below this share of its mean square
HEAD_WIDTH = 64  # channels of an attention head


class LinearHeads(nn.Module):
    """One linear head for each setting, all on the same whitened features.

    Args:
        mean: ``(D,)``, subtracted from the features.
        whiten: ``(D, D)``, the centred features are multiplied by it.
        heads: number of heads.
        classes: number of classes.
    """

    def __init__(self, mean: Tensor, whiten: Tensor, heads: int, classes: int) -> None:
        super().__init__()
        self.mean, self.whiten = nn.Buffer(mean), nn.Buffer(whiten)
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

    def loss(prepared: Tensor, labels: Tensor) -> Tensor:
        penalty = decay / 2 * (heads.weight.square() * penalty_scale).sum((1, 2))
        return (lr * (cross_entropy(heads.logits(prepared), labels).mean(0) + penalty)).sum()

    training.minimise(optimizer, loss, whitened(features, heads))
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


class AttentiveHeads(nn.Module):
    """One attentive head for each setting, all on the same patches.

    A head has no MLP, as in CAPI (2502.08769); V-JEPA (2404.08471) adds one.

    Args:
        width: channels of the patches; attention heads have 64 channels if that divides the width, else there is one.
        classes: number of classes.
        heads: number of heads.
    """

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        attention_heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),  # some networks do not normalise their last patches
                AttentionPoolLatent(width, out_features=0, num_heads=attention_heads, q_proj=False),
                nn.Linear(width, classes),
            )
            for _ in range(heads)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(B, heads, C)`` logits of ``(B, P, D)`` patches."""
        return torch.stack([head(tokens) for head in self.heads], dim=1)


def fit_attentive(features: Features, settings: Sequence[Setting], training: Training) -> AttentiveHeads:
    """Train an attentive head for each setting on the same batches, with AdamW and a cosine schedule."""
    with seeded(fold_seed(training.seed, Stream.HEAD)):
        heads = AttentiveHeads(features.store.shape[-1], len(features.classes), len(settings)).to(training.device)
    groups = [
        {"params": list(head.parameters()), "lr": setting.lr, "weight_decay": setting.weight_decay}
        for head, setting in zip(heads.heads, settings, strict=True)
    ]

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(heads(tokens), labels).mean(0).sum()

    training.minimise(torch.optim.AdamW(groups), loss, features)
    return heads.eval()
