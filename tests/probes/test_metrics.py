from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score

from mapet.probes.metrics import per_class, score


def test_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth, logits = rng.integers(0, 8, 300), rng.normal(size=(300, 8))
    logits[np.arange(300), truth] += 1
    scores = score(truth, (-logits).argsort(axis=1)[:, :5], [f"c{i}" for i in range(8)])
    assert scores.accuracy == accuracy_score(truth, logits.argmax(1))
    assert scores.top5 == pytest.approx(top_k_accuracy_score(truth, logits, k=5))
    assert np.array_equal(scores.confusion, confusion_matrix(truth, logits.argmax(1)))
    assert per_class(scores.confusion, scores.classes)["c3"] == pytest.approx(
        (logits.argmax(1) == 3)[truth == 3].mean()
    )


def test_a_class_without_test_images_has_no_accuracy_and_few_classes_no_top5() -> None:
    scores = score(np.array([0, 0, 2]), np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0]]), ["a", "b", "c"])
    assert per_class(scores.confusion, scores.classes) == {"a": 0.5, "b": None, "c": 1.0}
    assert scores.top5 is None
    assert scores.confusion.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
