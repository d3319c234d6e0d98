"""Probes: heads trained on frozen features, many settings side by side, of which the best is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mapet.data.batches import StepSampler
from mapet.data.seeds import Stream, fold_seed
from mapet.errors import MapetError
from mapet.probes.features import Features, hold_out
from mapet.probes.metrics import MOST_GUESSES, IntArray, Scores, score

USUAL_STEPS, LEAST_PASSES = 2000, 10
PREDICTED_AT_A_TIME = 1024


@dataclass(frozen=True)
class Setting:
    """Of one head: learning rate and weight decay."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Training:
    """How heads are trained.

    Attributes:
        seed: decides initial weights, the order of images and what is held out.
        device: where.
        steps: optimiser steps; None: 2,000, or ten passes over the images if that is more.
        batch_size: images a step, or all if they are fewer.
        most_passes: over few images, for which 2,000 steps would be more; None: they are taken.
        show: is told how many steps are done, of twice as many in ``evaluate_probe``.
    """

    seed: int
    device: torch.device
    steps: int | None = None
    batch_size: int = 512
    most_passes: int | None = None
    show: Callable[[int], None] = lambda done: None

    def steps_for(self, images: int) -> int:
        """Optimiser steps for so many images."""
        steps = USUAL_STEPS
        if self.most_passes is not None:
            steps = min(steps, self.most_passes * images // min(self.batch_size, images))
        return self.steps or max(steps, LEAST_PASSES * images // self.batch_size)

    def batches(self, features: Features) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the ``(features, labels)`` of every step, on the device; each pass shows every image once."""
        size, steps = min(self.batch_size, len(features)), self.steps_for(len(features))
        sampler = StepSampler(len(features), size, fold_seed(self.seed, Stream.HEAD, 1), 0, steps)
        for step, keys in enumerate(sampler):
            yield self._put(features, np.array([index for _, index in keys]))
            self.show(step + 1)

    def in_order(self, features: Features) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all ``(features, labels)``, in order, on the device."""
        for start in range(0, len(features), PREDICTED_AT_A_TIME):
            yield self._put(features, slice(start, start + PREDICTED_AT_A_TIME))

    def _put(self, features: Features, indices: IntArray | slice) -> tuple[Tensor, Tensor]:
        x, y = features.take(indices)
        return torch.from_numpy(x).float().to(self.device), torch.from_numpy(y).to(self.device)


# Trains a head for every setting on the same batches: maps ``(B, ...)`` features to ``(B, settings, C)`` logits.
Fit = Callable[[Features, Sequence[Setting], Training], nn.Module]


@dataclass(frozen=True)
class ProbeResult:
    """Outcome of a probe.

    Attributes:
        setting: what did best on the held-out part of the training images.
        held_out: accuracy in 0..1 there, by setting.
        scores: on the test images, of a head trained with ``setting`` on all training images.
    """

    setting: Setting
    held_out: dict[Setting, float]
    scores: Scores


def grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> list[Setting]:
    """Return every combination."""
    return [Setting(lr, weight_decay) for lr, weight_decay in product(lrs, weight_decays)]


def evaluate_probe(
    fit: Fit, train: Features, test: Features, settings: Sequence[Setting], training: Training
) -> ProbeResult:
    """Train a head for every setting in one pass, keep the best on held-out images, train it on all, and test it.

    Args:
        fit: trains the heads.
        train, test: features; the test part decides nothing.
        settings: to choose from.
        training: how they are trained.

    Raises:
        MapetError: if every head diverged.
    """
    # Equally long, so that what is chosen suits what it is chosen for.
    steps = training.steps_for(len(train))
    training = replace(training, steps=steps)
    rest, kept = (train.subset(indices) for indices in hold_out(train.y, training.seed))
    accuracy, loss = _measure(fit(rest, settings, training), kept, training)
    if not loss.isfinite().any():
        lrs = ", ".join(f"{setting.lr:g}" for setting in settings)
        raise MapetError(f"the probe diverged at every learning rate ({lrs}); take a lower --lr")
    accuracy = accuracy.where(loss.isfinite(), -torch.inf)
    # Of equally accurate heads the surer one.
    best = min(range(len(settings)), key=lambda i: (-float(accuracy[i]), float(loss[i])))
    held_out = {setting: max(0.0, float(value)) for setting, value in zip(settings, accuracy, strict=True)}
    last = replace(training, show=lambda done: training.show(steps + done))
    guesses = predict(fit(train, [settings[best]], last), test, training)
    return ProbeResult(settings[best], held_out, score(test.y, guesses, train.classes))


@torch.no_grad()
def predict(heads: nn.Module, features: Features, training: Training) -> IntArray:
    """Return ``(n, min(5, C))`` class indices by the first head, the likeliest first.

    Raises:
        MapetError: if the head diverged.
    """
    guesses = []
    for x, _ in training.in_order(features):
        logits = heads(x)[:, 0]
        if not logits.isfinite().all():
            raise MapetError("the probe diverged when it was trained on all images; take a lower --lr")
        guesses.append(logits.topk(min(MOST_GUESSES, len(features.classes))).indices.cpu())
    return torch.cat(guesses).numpy()


@torch.no_grad()
def _measure(heads: nn.Module, features: Features, training: Training) -> tuple[Tensor, Tensor]:
    """Return accuracy in 0..1 and mean loss in nats, of each head."""
    right, loss = [], []
    for x, y in training.in_order(features):
        logits = heads(x)
        right.append((logits.argmax(-1) == y[:, None]).cpu())
        loss.append(cross_entropy(logits, y).cpu())
    return torch.cat(right).double().mean(0), torch.cat(loss).double().mean(0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every head, ``(B, heads)`` in nats, of ``(B, heads, C)`` logits and ``(B,)`` labels."""
    return F.cross_entropy(logits.movedim(1, 2), labels[:, None].expand(-1, logits.shape[1]), reduction="none")
