"""The evaluations by name, and their configurations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mapet.config.base import Common, StrictConfig
from mapet.config.keys import BatchSize, Count, InferenceKeys, LearningRate, WeightDecay

Rates = Annotated[tuple[LearningRate, ...], Field(min_length=1)]
Decays = Annotated[tuple[WeightDecay, ...], Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1)]


class FeatureKeys(InferenceKeys):
    """The features that are evaluated."""

    features: Literal["pooled", "class", "mean", "class+mean"] = Field(
        "pooled",
        description="pooled (the input of the model's own classifier), class (the class token), mean (over patches) "
        "or class+mean",
        json_schema_extra=Common,
    )


class HeadKeys(StrictConfig):
    """How the heads of a probe are trained."""

    steps: Count | None = Field(
        None,
        description="optimiser steps; default: 2000 (attentive: at most 300 passes), or 10 passes if that is more",
        json_schema_extra=Common,
    )
    seeds: int = Field(
        3,
        ge=1,
        le=100,
        description="repetitions, with the seeds from --seed upwards: they change initial weights, order and held-out "
        "images",
        json_schema_extra=Common,
    )


class KNNConfig(FeatureKeys):
    """A weighted k-NN classifier."""

    k: Counts = Field(
        (1, 5, 10, 20, 50, 100, 200),
        description="numbers of neighbours; the best one on held-out training images is used",
        json_schema_extra=Common,
    )
    # The default of Wu et al. (1805.01978) and DINO.
    temperature: float = Field(0.07, gt=0, description="neighbours vote with exp(similarity / temperature)")


class LinearConfig(HeadKeys, FeatureKeys):
    """A linear probe."""

    lr: Rates = Field((0.1, 0.3, 1.0), description="learning rates to choose from")
    weight_decay: Decays = Field(
        (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
        description="weight decays to choose from; 1 / (C n) for scikit-learn's C and n images",
    )
    probe_batch: BatchSize = Field(512, description="images per step of the probe")


class AttentiveConfig(HeadKeys, InferenceKeys):
    """An attentive probe."""

    lr: Rates = Field((3e-4, 1e-3, 3e-3), description="learning rates to choose from")
    weight_decay: Decays = Field((0.01,), description="weight decays to choose from")
    probe_batch: BatchSize = Field(256, description="images per step of the probe")


class ClassifyConfig(InferenceKeys):
    """The model's own classifier."""

    crop_pct: float | None = Field(
        0.9, ge=0.01, le=1, description="share of the resized image's side that the model sees; none: the model's own"
    )


# Configuration and help text of each evaluation.
EVALUATIONS: dict[str, tuple[type[InferenceKeys], str]] = {
    "knn": (KNNConfig, "classify images by their nearest neighbours among the features of training images"),
    "linear": (LinearConfig, "train a linear classifier on frozen features"),
    "attentive": (AttentiveConfig, "train a classifier that attends to the frozen features of patches"),
    "classify": (ClassifyConfig, "measure a fine-tuned model's own classifier"),
}
