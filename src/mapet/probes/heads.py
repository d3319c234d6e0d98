"""Probes: heads with different settings, trained together on frozen features; the best setting is tested."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mapet.data.batches import StepSampler
from mapet.data.seeds import Stream, fold_seed
from mapet.errors import MapetError
from mapet.probes.labelled import MOST_GUESSES, Features, IntArray, Scores, Show, hold_out, score

USUAL_STEPS, LEAST_PASSES = 2000, 10
TEST_BATCH = 1024


@dataclass(frozen=True)
class Setting:
    """Learning rate and weight decay of a head."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Training:
    """How heads are trained.

    Attributes:
        seed: decides the initial weights, the order of the images and which images are held out.
        device: of the heads.
        steps: optimiser steps.
        batch_size: images of a step; all images if there are fewer.
        show: called with the number of steps done; ``evaluate_probe`` does twice ``steps``.
    """

    seed: int
    device: torch.device
    steps: int
    batch_size: int = 512
    show: Show = lambda done: None

    def minimise(self, optimizer: Optimizer, loss: Callable[[Tensor, Tensor], Tensor], features: Features) -> None:
        """Take the steps with a cosine schedule; ``loss`` is that of the features and labels of a batch."""
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for x, y in self.batches(features):
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
            schedule.step()

    def batches(self, features: Features) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the ``(features, labels)`` of each step, on the device; a pass shows every image once."""
        size, seed = min(self.batch_size, len(features)), fold_seed(self.seed, Stream.HEAD, 1)
        for step, keys in enumerate(StepSampler(len(features), size, seed, 0, self.steps)):
            yield self._to_device(features, np.array([index for _, index in keys]))
            self.show(step + 1)

    def in_order(self, features: Features) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all ``(features, labels)`` in order, on the device."""
        for start in range(0, len(features), TEST_BATCH):
            yield self._to_device(features, slice(start, start + TEST_BATCH))

    def _to_device(self, features: Features, indices: IntArray | slice) -> tuple[Tensor, Tensor]:
        x, y = features.take(indices)
        return torch.from_numpy(x).float().to(self.device), torch.from_numpy(y).to(self.device)


def default_steps(images: int, batch_size: int, most_passes: int | None = None) -> int:
    """Return the number of optimiser steps for this many training images: 2,000, or ten passes if that is more.

    Args:
        images: number of training images.
        batch_size: images of a step.
        most_passes: over the images, which limits the 2,000; None: no limit.
    """
    most_steps = USUAL_STEPS if most_passes is None else most_passes * images // min(batch_size, images)
    return max(min(USUAL_STEPS, most_steps), LEAST_PASSES * images // batch_size)


# Trains one head per setting on the same batches; the result maps ``(B, ...)`` features to ``(B, heads, C)`` logits.
Fit = Callable[[Features, Sequence[Setting], Training], nn.Module]


@dataclass(frozen=True)
class ProbeResult:
    """Result of a probe.

    Attributes:
        setting: the best setting on the held-out training images.
        held_out: accuracy in 0..1 on these images, by setting.
        scores: on the test images, of a head trained on all training images with the best setting.
    """

    setting: Setting
    held_out: dict[Setting, float]
    scores: Scores


def grid(lrs: Sequence[float], weight_decays: Sequence[float]) -> list[Setting]:
    """Return every combination of learning rate and weight decay."""
    return [Setting(lr, weight_decay) for lr in lrs for weight_decay in weight_decays]


def evaluate_probe(
    fit: Fit, train: Features, test: Features, settings: Sequence[Setting], training: Training
) -> ProbeResult:
    """Choose the best setting on held-out training images, train a head with it on all of them, and test the head.

    Args:
        fit: trains the heads.
        train, test: features; the test images do not influence the choice.
        settings: to choose from.
        training: how the heads are trained.

    Raises:
        MapetError: if every head diverged, or no image can be held out.
    """
    rest, held_out = (train.subset(indices) for indices in hold_out(train.y, training.seed))
    accuracy, loss = _measure(fit(rest, settings, training), held_out, training)
    if not loss.isfinite().any():
        lrs = ", ".join(f"{setting.lr:g}" for setting in settings)
        raise MapetError(f"the probe diverged at every learning rate ({lrs}); pass a lower --lr")
    accuracy = accuracy.where(loss.isfinite(), 0.0)
    # Of settings with equal accuracy the one with the lower loss; the loss of a head that diverged is not comparable.
    loss = loss.where(loss.isfinite(), torch.inf)
    best = min(range(len(settings)), key=lambda i: (-float(accuracy[i]), float(loss[i])))
    # The same number of steps as before, so that the chosen setting suits this training too.
    last = replace(training, show=lambda done: training.show(training.steps + done))
    guesses = predict(fit(train, [settings[best]], last), test, training)
    accuracies = dict(zip(settings, accuracy.tolist(), strict=True))
    return ProbeResult(settings[best], accuracies, score(test.y, guesses, train.classes))


@torch.no_grad()
def predict(heads: nn.Module, features: Features, training: Training) -> IntArray:
    """Return the ``(n, min(5, C))`` classes that the first head predicts, the most probable first.

    Raises:
        MapetError: if the head diverged.
    """
    guesses = []
    for x, _ in training.in_order(features):
        logits = heads(x)[:, 0]
        if not logits.isfinite().all():
            raise MapetError("the probe diverged when it was trained on all images; pass a lower --lr")
        guesses.append(logits.topk(min(MOST_GUESSES, len(features.classes))).indices.cpu())
    return torch.cat(guesses).numpy()


@torch.no_grad()
def _measure(heads: nn.Module, features: Features, training: Training) -> tuple[Tensor, Tensor]:
    """Return the accuracy in 0..1 and the mean loss in nats of each head."""
    right, loss = [], []
    for x, y in training.in_order(features):
        logits = heads(x)
        right.append((logits.argmax(-1) == y[:, None]).cpu())
        loss.append(cross_entropy(logits, y).cpu())
    return torch.cat(right).double().mean(0), torch.cat(loss).double().mean(0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the ``(B, heads)`` loss in nats of ``(B, heads, C)`` logits and ``(B,)`` labels."""
    return F.cross_entropy(logits.movedim(1, 2), labels[:, None].expand(-1, logits.shape[1]), reduction="none")
