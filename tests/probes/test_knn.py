from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from mapet import MapetError
from mapet.data.open import few_per_class, open_labelled
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.jobs.evaluate.config import KNNConfig
from mapet.probes.knn import classify, evaluate_knn
from mapet.probes.labelled import Features, extract_features

VIEW = PlainView((28, 28), (0.286,), (0.353,))
NEIGHBOURS = KNNConfig.model_fields["k"].default
Parts = tuple[Features, Features]


def measure(read: Any, train: int, test: int) -> Parts:
    seen, unseen = open_labelled("mnist")
    parts = few_per_class(seen, train, seed=0), few_per_class(unseen, test, seed=0)
    found = [extract_features(read, part, VIEW, Reading(1), device=torch.device("cpu")) for part in parts]
    return found[0], found[1]


@pytest.fixture(scope="module")
def pixels() -> Parts:
    return measure(nn.Flatten(), 200, 50)


def reference(known: Any, labels: Any, asked: Any, k: int, temperature: float = 0.07) -> Any:
    """The predictions of scikit-learn, in float64."""
    weights = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    classifier = KNeighborsClassifier(k, metric="cosine", weights=weights)
    return classifier.fit(known.astype(np.float64), labels).predict(asked.astype(np.float64))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("network", ["pixels", "vit"])
def test_predictions_equal_those_of_scikit_learn(
    network: str, temperature: float, pixels: Parts, tiny_vit: Callable[..., Any]
) -> None:
    """The features of an untrained network are nearly the same for all images."""
    train, test = pixels if network == "pixels" else measure(tiny_vit(channels=1).eval(), 200, 50)
    found = classify(train.x, train.y, test.x, NEIGHBOURS, temperature, 10)
    for k in NEIGHBOURS:
        assert np.array_equal(found[k][:, 0], reference(train.x, train.y, test.x, k, temperature)), k


def test_duplicates_and_equal_votes_are_resolved_as_in_scikit_learn(pixels: Parts) -> None:
    train, test = pixels
    twice, labels = np.concatenate([train.x, train.x]), np.concatenate([train.y, train.y])
    found = classify(twice, labels, test.x, [1, 2, 10], 0.07, 10)
    for k in (2, 10):
        assert np.array_equal(found[k][:, 0], reference(twice, labels, test.x, k))
    assert np.array_equal(found[1], classify(train.x, train.y, test.x, [1], 0.07, 10)[1])
    pair = np.stack([test.x[0], test.x[0]])
    for order in ([7, 3], [3, 7]):
        assert classify(pair, np.array(order), test.x[:1], [2], 0.07, 10)[2][0, 0] == 3
        assert reference(pair, np.array(order), test.x[:1], 2) == [3]


def test_of_equally_near_neighbours_the_first_counts(pixels: Parts) -> None:
    train, test = pixels
    copies = np.repeat(train.x[:1], 400, axis=0)
    for start in (0, 250):
        labels = np.roll(np.arange(400), start)
        assert (classify(copies, labels, test.x[:3], [1], 0.07, 400)[1][:, 0] == labels[0]).all()


@pytest.mark.parametrize("temperature", [1e-5, 1e-9])
def test_a_low_temperature_gives_the_nearest_neighbour(temperature: float, pixels: Parts) -> None:
    train, test = pixels
    nearest = classify(train.x, train.y, test.x, [1], 0.07, 10)[1]
    assert np.array_equal(classify(train.x, train.y, test.x, [50], temperature, 10)[50][:, 0], nearest[:, 0])


def test_k_is_chosen_on_held_out_training_images(pixels: Parts) -> None:
    train, test = pixels
    scores, best, sweep = evaluate_knn(train, test, NEIGHBOURS, 0.07, seed=1)
    assert [row["k"] for row in sweep] == list(NEIGHBOURS)
    chosen = max(sweep, key=lambda row: row["held_out"])
    assert best == chosen["k"]
    assert scores.accuracy == chosen["test"] > 0.7
    wrong_test = replace(test, y=(test.y + 1) % 10)
    wrong_scores, wrong_best, wrong_sweep = evaluate_knn(train, wrong_test, NEIGHBOURS, 0.07, seed=1)
    assert wrong_best == best
    assert [row["held_out"] for row in wrong_sweep] == [row["held_out"] for row in sweep]
    assert wrong_scores.accuracy < 0.3


def test_more_neighbours_than_training_images(pixels: Parts) -> None:
    train, test = pixels
    few = train.subset(np.concatenate([np.flatnonzero(train.y == label)[:5] for label in range(10)]))
    assert [row["k"] for row in evaluate_knn(few, test, NEIGHBOURS, 0.07, seed=0)[2]] == [1, 5, 10, 20]
    with pytest.raises(MapetError, match=r"k = 60 .* there are 40 besides .* held out.*--k 40 or less"):
        evaluate_knn(few, test, [60], 0.07, seed=0)
