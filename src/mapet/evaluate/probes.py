"""k-NN and linear probe on frozen features, by scikit-learn."""

from __future__ import annotations

import warnings

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mapet.evaluate.features import Features

NEIGHBOURS = 10


def knn_accuracy(train: Features, test: Features, neighbours: int = NEIGHBOURS) -> float:
    """Accuracy in 0..1 of the ``neighbours`` nearest training images by cosine, weighted by 1 / distance."""
    classifier = KNeighborsClassifier(min(neighbours, len(train.y)), metric="cosine", weights="distance")
    return float(classifier.fit(train.x, train.y).score(test.x, test.y))


def linear_accuracy(train: Features, test: Features, regularisation: float = 0.1, iterations: int = 300) -> float:
    """Accuracy in 0..1 of multinomial logistic regression on standardised features.

    Args:
        train, test: features.
        regularisation: scikit-learn's ``C``, the inverse strength of the L2 penalty.
        iterations: at most so many of L-BFGS.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=iterations))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an early stop is as good a probe
        return float(probe.fit(train.x, train.y).score(test.x, test.y))
