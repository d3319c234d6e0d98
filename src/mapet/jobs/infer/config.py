"""The configurations of ``mapet embed`` and ``mapet predict``."""

from typing import Literal

from mapet.config.base import key
from mapet.config.keys import Count, InferenceKeys

FeatureKind = Literal["pooled", "class", "mean", "patches"]


class EmbedConfig(InferenceKeys):
    """Features of images, in a file."""

    features: tuple[FeatureKind, ...] = key(
        ("pooled",),
        "columns: pooled (the input of the model's own classifier), class (the class token), mean (over patches), "
        "patches (all of them); several may be given",
        common=True,
        min_length=1,
    )
    dtype: Literal["float32", "float16"] = key("float32", "type of the features in the file", common=True)


class PredictConfig(InferenceKeys):
    """Predicted classes of images, in a table."""

    top: Count = key(1, "number of classes for each image, the most probable first", common=True)
