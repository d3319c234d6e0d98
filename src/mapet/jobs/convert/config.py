"""The configuration of a conversion."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mapet.config.base import Common, StrictConfig


class ConvertConfig(StrictConfig):
    """A checkpoint of MaPeT's authors, and what its tensors do not tell."""

    file: str = Field(min_length=1, description="the authors' file: .tar, .pth, .pt or .safetensors")
    num_heads: int | None = Field(
        None, ge=1, description="attention heads; default: 64 channels each", json_schema_extra=Common
    )
    mean: tuple[float, ...] | None = Field(None, description="input mean per channel; default: ImageNet's")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, description="input standard deviation per channel; default: ImageNet's"
    )
    crop_pct: float | None = Field(
        None,
        ge=0.01,
        le=1,
        description="share of the resized image's side that the model sees; default: 0.9 for a classifier, else 1",
    )
