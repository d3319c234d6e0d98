"""What a network is worth: k-NN, linear and attentive probes, classification, segmentation."""

from mapet.evaluate.attentive import MOST_PASSES, fit_attentive
from mapet.evaluate.classifier import score_classifier
from mapet.evaluate.during import probe_evaluator
from mapet.evaluate.features import Features, extract_features
from mapet.evaluate.heads import ProbeResult, Setting, Training, evaluate_probe, grid
from mapet.evaluate.knn import KNNResult, evaluate_knn
from mapet.evaluate.linear import fit_linear
from mapet.evaluate.metrics import Scores, per_class, score
from mapet.evaluate.rows import Row, probe_row
from mapet.evaluate.segmentation import (
    HEADS,
    Confusion,
    HeadRecipe,
    build_head,
    patch_maps,
    predict_classes,
    train_head,
)

__all__ = [
    "HEADS",
    "MOST_PASSES",
    "Confusion",
    "Features",
    "HeadRecipe",
    "KNNResult",
    "ProbeResult",
    "Row",
    "Scores",
    "Setting",
    "Training",
    "build_head",
    "evaluate_knn",
    "evaluate_probe",
    "extract_features",
    "fit_attentive",
    "fit_linear",
    "grid",
    "patch_maps",
    "per_class",
    "predict_classes",
    "probe_evaluator",
    "probe_row",
    "score",
    "score_classifier",
    "train_head",
]
