"""What a backbone is worth: k-NN, linear probe, fine-tuning with few labels."""

from mapet.evaluate.during import probe_evaluator
from mapet.evaluate.features import Features, extract_features
from mapet.evaluate.finetune import FinetuneRecipe, finetune_accuracy
from mapet.evaluate.probes import knn_accuracy, linear_accuracy
from mapet.evaluate.rows import Row, finetune_row, probe_row

__all__ = [
    "Features",
    "FinetuneRecipe",
    "Row",
    "extract_features",
    "finetune_accuracy",
    "finetune_row",
    "knn_accuracy",
    "linear_accuracy",
    "probe_evaluator",
    "probe_row",
]
