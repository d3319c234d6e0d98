"""The configuration of a conversion."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mapet.config.base import Common, StrictConfig


class ConvertConfig(StrictConfig):
    """A published file, and what its tensors do not tell."""

    kind: Literal["upstream", "beit", "beitv2", "mae"] = Field(description="whose file it is")
    file: str = Field(min_length=1, description="the file: torch.save's (.tar, .pth, .pt) or .safetensors")
    model: str | None = Field(
        None,
        min_length=1,
        description="the timm model that it must be; default: one of the family, with the sizes of the file's tensors",
        json_schema_extra=Common,
    )
    num_heads: int | None = Field(
        None,
        ge=1,
        description="attention heads; default: 64 channels each (ViT-Huge: 80), or as a BEiT's position bias has them",
        json_schema_extra=Common,
    )
    mean: tuple[float, ...] | None = Field(
        None, description="input mean per channel; default: the published models' (beit: 0.5, others: ImageNet's)"
    )
    std: tuple[float, ...] | None = Field(
        None, description="input deviation per channel; default: the published models' (beit: 0.5, others: ImageNet's)"
    )
    crop_pct: float | None = Field(
        None,
        ge=0.01,
        le=1,
        description="share of the resized image's side that the model sees; default: a classifier's 0.9 "
        "(mae: 0.875), 1 without a classifier",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.std is not None and min(self.std, default=0.0) <= 0:
            raise ValueError("std must be positive")
        return self
