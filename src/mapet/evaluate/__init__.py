"""What a backbone is worth: k-NN and linear probe."""

"""What a backbone is worth: k-NN, linear probe, fine-tuning with few labels, segmentation."""

from mapet.evaluate.classifier import Scores, score_classifier
from mapet.evaluate.during import probe_evaluator
from mapet.evaluate.features import Features, extract_features
from mapet.evaluate.probes import knn_accuracy, linear_accuracy
from mapet.evaluate.rows import Row, finetune_row, probe_row
from mapet.evaluate.segmentation import HEADS, Confusion, HeadRecipe, build_head, predict_classes, train_head

__all__ = [
    "HEADS",
    "Confusion",
    "Features",
    "FinetuneRecipe",
    "HeadRecipe",
    "Row",
    "Scores",
    "build_head",
    "extract_features",
    "knn_accuracy",
    "linear_accuracy",
    "predict_classes",
    "probe_evaluator",
    "probe_row",
    "score_classifier",
    "train_head",
]
