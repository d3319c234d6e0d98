"""The evaluations by name, and their configurations."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mapet.config.base import Config, key
from mapet.config.keys import KNN_TEMPERATURE, BatchSize, Count, InferenceKeys, LearningRate, WeightDecay

Rates = Annotated[tuple[LearningRate, ...], Field(min_length=1)]
Decays = Annotated[tuple[WeightDecay, ...], Field(min_length=1)]


class FeatureKeys(InferenceKeys):
    """The features that are evaluated."""

    features: Literal["pooled", "class", "mean", "class+mean"] = key(
        "pooled",
        "pooled (the input of the model's own classifier), class (the class token), mean (over patches) or class+mean",
        common=True,
    )


class HeadKeys(Config):
    """How the heads of a probe are trained."""

    most_passes: ClassVar[int | None] = None  # limit of the default steps

    steps: Count | None = key(
        None,
        "optimiser steps; default: 2000 (attentive: at most 300 passes), or 10 passes if that is more",
        common=True,
    )
    seeds: int = key(
        3,
        "repetitions, with the seeds from --seed upwards: they change initial weights, order and held-out images",
        common=True,
        ge=1,
        le=100,
    )


class KNNConfig(FeatureKeys):
    """A weighted k-NN classifier."""

    k: Annotated[tuple[Count, ...], Field(min_length=1)] = key(
        (1, 5, 10, 20, 50, 100, 200),
        "numbers of neighbours; the best one on held-out training images is used",
        common=True,
    )
    temperature: float = key(KNN_TEMPERATURE, "neighbours vote with exp(similarity / temperature)", gt=0)


class LinearConfig(HeadKeys, FeatureKeys):
    """A linear probe."""

    lr: Rates = key((0.1, 0.3, 1.0), "learning rates to choose from")
    weight_decay: Decays = key(
        (1e-6, 1e-5, 1e-4, 1e-3, 1e-2), "weight decays to choose from; 1 / (C n) for scikit-learn's C and n images"
    )
    probe_batch: BatchSize = key(512, "images per step of the probe")


class AttentiveConfig(HeadKeys, InferenceKeys):
    """An attentive probe."""

    most_passes = 300

    lr: Rates = key((3e-4, 1e-3, 3e-3), "learning rates to choose from")
    weight_decay: Decays = key((0.01,), "weight decays to choose from")
    probe_batch: BatchSize = key(256, "images per step of the probe")


class ClassifyConfig(InferenceKeys):
    """The model's own classifier."""

    crop_pct: float | None = key(
        0.9, "share of the resized image's side that the model sees; none: the model's own", ge=0.01, le=1
    )


# Configuration and help text of each evaluation.
EVALUATIONS: dict[str, tuple[type[InferenceKeys], str]] = {
    "knn": (KNNConfig, "classify images by their nearest neighbours among the features of training images"),
    "linear": (LinearConfig, "train a linear classifier on frozen features"),
    "attentive": (AttentiveConfig, "train a classifier that attends to the frozen features of patches"),
    "classify": (ClassifyConfig, "measure a fine-tuned model's own classifier"),
}
