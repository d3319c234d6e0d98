"""One row of a results table: what a backbone is worth by every measure at once."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mapet.data import ImageSet, PlainView, few_per_class
from mapet.evaluate.features import extract_features
from mapet.evaluate.finetune import FinetuneRecipe, finetune_accuracy
from mapet.evaluate.probes import knn_accuracy, linear_accuracy

Row = dict[str, float]


def probe_row(
    model: nn.Module, train: ImageSet, test: ImageSet, view: PlainView, *, channels: int, workers: int = 0
) -> Row:
    """Return k-NN and linear-probe accuracies in 0..1; with ``nn.Flatten()`` as the model, of raw pixels."""
    seen = extract_features(model, train, view, channels=channels, workers=workers)
    unseen = extract_features(model, test, view, channels=channels, workers=workers)
    return {"knn": knn_accuracy(seen, unseen), "linear": linear_accuracy(seen, unseen)}


def finetune_row(
    backbone: VisionTransformer,
    train: ImageSet,
    test: ImageSet,
    view: PlainView,
    recipe: FinetuneRecipe,
    label_counts: Sequence[int],
    *,
    channels: int,
    seed: int,
) -> Row:
    """Return ``finetune_N`` for every number ``N`` of labels, with the same recipe and the same labels."""
    row = {}
    for count in label_counts:
        labelled = few_per_class(train, count, seed)
        row[f"finetune_{count}"] = finetune_accuracy(
            backbone, labelled, test, view, recipe, channels=channels, seed=seed
        )
    return row
