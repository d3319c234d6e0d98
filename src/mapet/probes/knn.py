"""The weighted k-NN classifier of Wu et al. (2018, 1805.01978, section 3.4), as DINO reports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.errors import MapetError
from mapet.probes.features import Features, FloatArray, hold_out
from mapet.probes.metrics import MOST_GUESSES, IntArray, Scores, score

CHUNK_BYTES = 256 * 2**20  # of similarities at a time

# Far below what float32 features mean. Rounded so, copies of an image are equally near, which the sums of a matrix
# product would leave to chance. The step from one index to the next then settles ties; among 60,000 images it adds up
# to 6e-11, which is still far below.
DECIMALS, TIE = 12, 1e-15


@dataclass(frozen=True)
class KNNResult:
    """Outcome of a k-NN evaluation.

    Attributes:
        k: the number of neighbours that did best on the held-out part of the training images.
        held_out, test: accuracy in 0..1 by number of neighbours.
        scores: on the test images, with ``k``.
    """

    k: int
    held_out: dict[int, float]
    test: dict[int, float]
    scores: Scores


def evaluate_knn(
    train: Features, test: Features, neighbours: Sequence[int], temperature: float, seed: int
) -> KNNResult:
    """Choose the number of neighbours on held-out training images, then classify the test images with all others.

    Args:
        train, test: ``(n, D)`` features.
        neighbours: numbers to choose from; those for which there are too few images are left out.
        temperature: see ``classify``.
        seed: decides what is held out.

    Raises:
        MapetError: if there are too few images for any number of neighbours.
    """
    rest, held_out = hold_out(train.y, seed)
    possible = [k for k in sorted(set(neighbours)) if k <= len(rest)]
    if not possible:
        raise MapetError(
            f"k-NN with k = {min(neighbours)} needs as many training images, but there are {len(rest)} besides those "
            f"held out to choose k by; take --k {len(rest)} or less"
        )
    count = len(train.classes)
    chosen_by = classify(*train.take(rest), train.take(held_out)[0], possible, temperature, count)
    held_out_accuracy = {k: float((chosen_by[k][:, 0] == train.y[held_out]).mean()) for k in possible}
    guesses = classify(train.x, train.y, test.x, possible, temperature, count)
    best = max(possible, key=lambda k: held_out_accuracy[k])  # of equals the first, which is the least
    accuracy = {k: float((guesses[k][:, 0] == test.y).mean()) for k in possible}
    return KNNResult(best, held_out_accuracy, accuracy, score(test.y, guesses[best], train.classes))


def classify(
    known: FloatArray, labels: IntArray, asked: FloatArray, neighbours: Sequence[int], temperature: float, count: int
) -> dict[int, IntArray]:
    """Classify by the ``k`` nearest in cosine similarity ``s``, each voting for its class with ``exp(s / T)``.

    Similarities are computed in float64: in float32 their rounding decides who is among the ``k`` nearest where
    features have much in common, as an untrained network's have. Neighbours equally near are taken in the order of
    their index; of classes with equal votes the first one wins.

    Args:
        known: ``(n, D)`` features.
        labels: ``(n,)`` class indices.
        asked: ``(m, D)`` features.
        neighbours: values of ``k``, none above ``n``.
        temperature: ``T``; the less, the more the nearest count.
        count: number of classes.

    Returns:
        by ``k``: ``(m, min(5, count))`` class indices, the likeliest first.
    """
    train, votes_for = _directions(known), torch.from_numpy(labels)
    later = TIE * torch.arange(len(train), dtype=torch.float64)
    found: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for chunk in torch.from_numpy(asked).split(max(1, CHUNK_BYTES // (8 * len(train)))):
        similarity = (_directions(chunk.numpy()) @ train.T).round(decimals=DECIMALS).clamp(-1, 1)
        nearest = (similarity - later).topk(max(neighbours)).indices
        # exp(s / T) up to a factor that all votes for an image share, so that the nearest counts 1 however small T is.
        near = similarity.gather(1, nearest)
        weights = ((near - near[:, :1]) / temperature).exp()
        for k in neighbours:
            votes = torch.zeros(len(chunk), count, dtype=torch.float64)
            votes.scatter_add_(1, votes_for[nearest[:, :k]], weights[:, :k])
            found[k].append(votes.sort(dim=1, descending=True, stable=True).indices[:, :MOST_GUESSES])
    return {k: torch.cat(parts).numpy() for k, parts in found.items()}


def _directions(x: FloatArray) -> Tensor:
    return F.normalize(torch.from_numpy(np.asarray(x, dtype=np.float64)), dim=1)
