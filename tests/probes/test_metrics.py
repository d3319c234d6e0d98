import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

from mapet.probes.metrics import per_class, score


def test_scores_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, logits = rng.integers(0, 8, 300), rng.normal(size=(300, 8))
    logits[np.arange(300), truth] += 1
    predicted = logits.argmax(1)
    scores = score(truth, (-logits).argsort(axis=1)[:, :5], [f"c{i}" for i in range(8)])
    assert scores.accuracy == accuracy_score(truth, predicted)
    assert scores.top5 == pytest.approx(top_k_accuracy_score(truth, logits, k=5))
    assert np.array_equal(scores.confusion, confusion_matrix(truth, predicted))
    assert per_class(scores.confusion, scores.classes)["c3"] == pytest.approx((predicted == 3)[truth == 3].mean())


def test_no_accuracy_for_a_class_without_images_and_no_top5_for_few_classes() -> None:
    scores = score(np.array([0, 0, 2]), np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0]]), ["a", "b", "c"])
    assert per_class(scores.confusion, scores.classes) == {"a": 0.5, "b": None, "c": 1.0}
    assert scores.top5 is None
