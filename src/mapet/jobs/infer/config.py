"""The configurations of ``mapet embed`` and ``mapet predict``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mapet.config.base import Common
from mapet.config.keys import Count, InferenceKeys

FeatureKind = Literal["pooled", "class", "mean", "patches"]


class EmbedConfig(InferenceKeys):
    """Features of images, in a file."""

    features: tuple[FeatureKind, ...] = Field(
        ("pooled",),
        min_length=1,
        description="columns: pooled (the input of the model's own classifier), class (the class token), mean (over "
        "patches), patches (all of them); several may be given",
        json_schema_extra=Common,
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="type of the features in the file", json_schema_extra=Common
    )


class PredictConfig(InferenceKeys):
    """Predicted classes of images, in a table."""

    top: Count = Field(
        1, description="number of classes for each image, the most probable first", json_schema_extra=Common
    )
