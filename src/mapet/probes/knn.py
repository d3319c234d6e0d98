"""Weighted k-NN classifier of Wu et al. (2018, 1805.01978, section 3.4), as DINO reports it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.errors import MapetError
from mapet.probes.labelled import MOST_GUESSES, Features, FloatArray, IntArray, Scores, accuracy, hold_out, score

CHUNK_BYTES = 256 * 2**20  # of similarities at a time

# Similarities are rounded to 12 decimals, far below the precision of float32 features, so that copies of an image are
# equally similar whatever the rounding of the matrix product. Ties are then broken by index: each index is worse than
# the one before by 1e-15, which adds up to 6e-11 over 60,000 images.
DECIMALS, TIE = 12, 1e-15


def evaluate_knn(
    train: Features, test: Features, neighbours: Sequence[int], temperature: float, seed: int
) -> tuple[Scores, int, list[dict[str, float]]]:
    """Choose the number of neighbours on held-out training images, then classify the test images.

    Args:
        train, test: ``(n, D)`` features.
        neighbours: numbers to choose from; numbers above that of the training images are left out.
        temperature: see ``classify``.
        seed: decides which images are held out.

    Returns:
        scores on the test images with the best ``k``, this ``k``, and for each ``k`` the accuracy in 0..1 on the
        held-out and the test images (``held_out``, ``test``).

    Raises:
        MapetError: if every number of neighbours is too large, or no image can be held out.
    """
    rest, held_out = hold_out(train.y, seed)
    possible = [k for k in sorted(set(neighbours)) if k <= len(rest)]
    if not possible:
        raise MapetError(
            f"k-NN with k = {min(neighbours)} needs as many training images, but there are {len(rest)} besides the "
            f"images held out to choose k; pass --k {len(rest)} or less"
        )
    count = len(train.classes)
    guesses = classify(*train.take(rest), train.take(held_out)[0], possible, temperature, count)
    on_held_out = {k: accuracy(train.y[held_out], guesses[k]) for k in possible}
    guesses = classify(train.x, train.y, test.x, possible, temperature, count)
    sweep = [{"k": k, "held_out": on_held_out[k], "test": accuracy(test.y, guesses[k])} for k in possible]
    best = max(possible, key=lambda k: on_held_out[k])  # the smallest k of those that are equally accurate
    return score(test.y, guesses[best], train.classes), best, sweep


def classify(
    known: FloatArray, labels: IntArray, asked: FloatArray, neighbours: Sequence[int], temperature: float, count: int
) -> dict[int, IntArray]:
    """Classify by the ``k`` nearest neighbours in cosine similarity ``s``, each with the vote ``exp(s / T)``.

    Similarities are computed in float64: the features of an untrained network are so similar that rounding in float32
    changes the ``k`` nearest. Of equally similar neighbours those with the lower index are taken, of classes with
    equal votes the first.

    Args:
        known: ``(n, D)`` features of the training images.
        labels: ``(n,)`` class indices of the training images.
        asked: ``(m, D)`` features of the images to classify.
        neighbours: values of ``k``, at most ``n``.
        temperature: ``T``; a lower one gives the nearest neighbours more weight.
        count: number of classes.

    Returns:
        for each ``k`` ``(m, min(5, count))`` class indices, the most probable first.
    """
    train, votes_for = F.normalize(torch.from_numpy(known).double(), dim=1), torch.from_numpy(labels)
    tie_break = TIE * torch.arange(len(train), dtype=torch.float64)
    found: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for chunk in torch.from_numpy(asked).split(max(1, CHUNK_BYTES // (8 * len(train)))):
        similarity = (F.normalize(chunk.double(), dim=1) @ train.T).round(decimals=DECIMALS).clamp(-1, 1)
        nearest = (similarity - tie_break).topk(max(neighbours)).indices
        # Relative to the nearest neighbour, whose vote is 1, so that no vote overflows for a small T.
        near = similarity.gather(1, nearest)
        weights = ((near - near[:, :1]) / temperature).exp()
        for k in neighbours:
            votes = torch.zeros(len(chunk), count, dtype=torch.float64)
            votes.scatter_add_(1, votes_for[nearest[:, :k]], weights[:, :k])
            found[k].append(votes.sort(dim=1, descending=True, stable=True).indices[:, :MOST_GUESSES])
    return {k: torch.cat(parts).numpy() for k, parts in found.items()}
