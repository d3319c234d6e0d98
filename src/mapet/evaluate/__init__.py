"""What a backbone is worth: k-NN and linear probe."""

from mapet.evaluate.classifier import Scores, score_classifier
from mapet.evaluate.during import probe_evaluator
from mapet.evaluate.features import Features, extract_features
from mapet.evaluate.probes import knn_accuracy, linear_accuracy
from mapet.evaluate.rows import Row, probe_row

__all__ = [
    "Features",
    "Row",
    "Scores",
    "extract_features",
    "knn_accuracy",
    "linear_accuracy",
    "probe_evaluator",
    "probe_row",
    "score_classifier",
]
