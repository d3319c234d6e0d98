from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from mapet.data import PlainView, few_per_class, open_labelled
from mapet.evaluate import Features, extract_features, knn_accuracy, linear_accuracy

VIEW = PlainView((28, 28), (0.13,), (0.31,))


@pytest.fixture(scope="module")
def pixels() -> tuple[Features, Features]:
    train, test = open_labelled("mnist")
    parts = few_per_class(train, 50, seed=0), few_per_class(test, 20, seed=0)
    return tuple(extract_features(nn.Flatten(), part, VIEW, channels=1) for part in parts)  # type: ignore[return-value]


def test_knn_equals_the_definition(pixels: tuple[Features, Features]) -> None:
    train, test = pixels
    a, b = (f.x.astype(np.float64) / np.linalg.norm(f.x.astype(np.float64), axis=1, keepdims=True) for f in pixels)
    distance = 1 - b @ a.T
    votes = np.zeros((len(test.y), 10))
    for row, nearest in enumerate(distance.argsort(axis=1)[:, :10]):
        np.add.at(votes[row], train.y[nearest], 1 / distance[row, nearest])
    assert knn_accuracy(train, test) == pytest.approx((votes.argmax(1) == test.y).mean(), abs=1e-9)


def test_linear_separates_what_is_separable(pixels: tuple[Features, Features]) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = (np.eye(3)[y] @ rng.normal(size=(3, 8)) * 20 + rng.normal(size=(300, 8))).astype(np.float32)
    assert linear_accuracy(Features(x[:200], y[:200]), Features(x[200:], y[200:])) > 0.99
    shuffled = Features(x[:200], rng.permutation(y[:200]))
    assert linear_accuracy(shuffled, Features(x[200:], y[200:])) < 0.6
    assert 0.75 < linear_accuracy(*pixels) < 0.95
