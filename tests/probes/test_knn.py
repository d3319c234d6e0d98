from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from mapet import MapetError
from mapet.data.labelled import few_per_class, open_labelled
from mapet.data.views import PlainView
from mapet.jobs.evaluate.config import KNN_TEMPERATURE, KNNConfig
from mapet.probes.features import Features, extract_features
from mapet.probes.knn import classify, evaluate_knn

VIEW = PlainView((28, 28), (0.286,), (0.353,))
NEIGHBOURS = KNNConfig.model_fields["k"].default
Parts = tuple[Features, Features]


def measure(read: Any, train: int, test: int) -> Parts:
    seen, unseen = open_labelled("fashion-mnist")
    parts = few_per_class(seen, train, seed=0), few_per_class(unseen, test, seed=0)
    found = [extract_features(read, part, VIEW, 1, device=torch.device("cpu")) for part in parts]
    return found[0], found[1]


@pytest.fixture(scope="module")
def pixels() -> Parts:
    return measure(nn.Flatten(), 200, 50)


def reference(known: Any, labels: Any, asked: Any, k: int, temperature: float = KNN_TEMPERATURE) -> Any:
    """scikit-learn's predictions, in its own float64."""
    weights = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    classifier = KNeighborsClassifier(k, metric="cosine", weights=weights)
    return classifier.fit(known.astype(np.float64), labels).predict(asked.astype(np.float64))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("network", ["pixels", "vit"])
def test_predictions_are_scikit_learns(
    network: str, temperature: float, pixels: Parts, tiny_vit: Callable[..., Any]
) -> None:
    """Also on the features of an untrained network, which are nearly the same for all images."""
    train, test = pixels if network == "pixels" else measure(tiny_vit(channels=1).eval(), 200, 50)
    found = classify(train.x, train.y, test.x, NEIGHBOURS, temperature, 10)
    for k in NEIGHBOURS:
        assert np.array_equal(found[k][:, 0], reference(train.x, train.y, test.x, k, temperature)), k
        assert found[k].shape == (500, 5)


def test_duplicates_and_equal_votes_are_settled_as_by_scikit_learn(pixels: Parts) -> None:
    train, test = pixels
    twice, labels = np.concatenate([train.x, train.x]), np.concatenate([train.y, train.y])
    found = classify(twice, labels, test.x, [1, 2, 10], KNN_TEMPERATURE, 10)
    for k in (2, 10):
        assert np.array_equal(found[k][:, 0], reference(twice, labels, test.x, k))
    assert np.array_equal(found[1], classify(train.x, train.y, test.x, [1], KNN_TEMPERATURE, 10)[1])
    # The same image under two labels: equal votes go to the first class.
    pair = np.stack([test.x[0], test.x[0]])
    for order in ([7, 3], [3, 7]):
        assert classify(pair, np.array(order), test.x[:1], [2], KNN_TEMPERATURE, 10)[2][0, 0] == 3
        assert reference(pair, np.array(order), test.x[:1], 2) == [3]


def test_of_neighbours_equally_near_the_first_counts(pixels: Parts) -> None:
    train, test = pixels
    copies = np.repeat(train.x[:1], 400, axis=0)
    labels = np.arange(400)
    for start in (0, 250):
        found = classify(np.roll(copies, start), np.roll(labels, start), test.x[:3], [1], KNN_TEMPERATURE, 400)[1]
        assert (found[:, 0] == np.roll(labels, start)[0]).all()


def test_a_small_temperature_leaves_the_nearest_alone(pixels: Parts) -> None:
    train, test = pixels
    found = classify(train.x, train.y, test.x, [1, 50], 1e-5, 10)
    assert np.array_equal(found[1][:, 0], found[50][:, 0])


def test_k_is_chosen_without_the_test_images(pixels: Parts) -> None:
    train, test = pixels
    result = evaluate_knn(train, test, NEIGHBOURS, KNN_TEMPERATURE, seed=1)
    assert result.k == max(sorted(result.held_out), key=lambda k: result.held_out[k])
    assert list(result.held_out) == list(result.test) == list(NEIGHBOURS)
    assert result.scores.accuracy == result.test[result.k] > 0.7
    shuffled = Features(test.store, test.rows, np.roll(test.y, 1), test.classes)
    other = evaluate_knn(train, shuffled, NEIGHBOURS, KNN_TEMPERATURE, seed=1)
    assert (other.k, other.held_out) == (result.k, result.held_out)
    assert other.scores.accuracy < 0.3


def test_more_neighbours_than_images(pixels: Parts) -> None:
    train, test = pixels
    few = train.subset(np.concatenate([np.flatnonzero(train.y == c)[:5] for c in range(10)]))
    assert list(evaluate_knn(few, test, NEIGHBOURS, KNN_TEMPERATURE, seed=0).test) == [1, 5, 10, 20]
    with pytest.raises(MapetError, match=r"k = 60 .* there are 40 besides those held out.*--k 40 or less"):
        evaluate_knn(few, test, [60], KNN_TEMPERATURE, seed=0)


def test_a_small_temperature_leaves_the_nearest(pixels: Parts) -> None:
    train, test = pixels
    nearest = classify(train.x, train.y, test.x, [1], KNN_TEMPERATURE, 10)[1][:, 0]
    assert np.array_equal(classify(train.x, train.y, test.x, [20], 1e-9, 10)[20][:, 0], nearest)
