"""The configuration of a conversion."""

from typing import Annotated

from pydantic import Field

from mapet.config.base import Config, key
from mapet.config.keys import Text


class ConvertConfig(Config):
    """A checkpoint of MaPeT's authors, and what its tensors do not tell."""

    file: Text = key(..., "the authors' file: .tar, .pth, .pt or .safetensors")
    num_heads: int | None = key(None, "attention heads; default: 64 channels each", common=True, ge=1)
    mean: tuple[float, ...] | None = key(None, "input mean per channel; default: ImageNet's")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = key(
        None, "input standard deviation per channel; default: ImageNet's"
    )
    crop_pct: float | None = key(
        None,
        "share of the resized image's side that the model sees; default: 0.9 for a classifier, else 1",
        ge=0.01,
        le=1,
    )
