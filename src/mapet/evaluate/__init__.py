"""What a network is worth: k-NN, linear and attentive probes, classification, fine-tuning with few labels."""

from mapet.evaluate.attentive import fit_attentive
from mapet.evaluate.classifier import score_classifier
from mapet.evaluate.during import probe_evaluator
from mapet.evaluate.features import Features, extract_features
from mapet.evaluate.finetune import FinetuneRecipe, finetune_accuracy
from mapet.evaluate.heads import ProbeResult, Setting, Training, evaluate_probe, grid
from mapet.evaluate.knn import KNNResult, evaluate_knn
from mapet.evaluate.linear import fit_linear
from mapet.evaluate.metrics import Scores, per_class, score
from mapet.evaluate.rows import Row, finetune_row, probe_row

__all__ = [
    "Features",
    "FinetuneRecipe",
    "KNNResult",
    "ProbeResult",
    "Row",
    "Scores",
    "Setting",
    "Training",
    "evaluate_knn",
    "evaluate_probe",
    "extract_features",
    "finetune_accuracy",
    "finetune_row",
    "fit_attentive",
    "fit_linear",
    "grid",
    "per_class",
    "probe_evaluator",
    "probe_row",
    "score",
    "score_classifier",
]
