"""The configuration of ``mapet eval segment``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mapet.config.base import Common
from mapet.config.keys import BatchSize, Count, DataKeys, Epochs, LearningRate, NetworkKeys, PrecisionKeys, WeightDecay


class SegmentConfig(NetworkKeys, PrecisionKeys, DataKeys):
    """A head on frozen patch features, trained and measured on images with masks of class ids."""

    data: str = Field(
        min_length=1, description="a folder with images/ and masks/, or ADE20K's", json_schema_extra=Common
    )
    head: Literal["linear", "conv"] = Field(
        "linear",
        description="linear, or conv (a 3x3 convolution to 256 channels comes first)",
        json_schema_extra=Common,
    )
    classes: int | None = Field(
        None, ge=2, le=4096, description="default: one more than the greatest id in the masks", json_schema_extra=Common
    )
    seeds: int = Field(1, ge=1, le=100, description="number of heads, with seeds from --seed", json_schema_extra=Common)
    batch_size: BatchSize = Field(16, description="crops per step; windows at a time", json_schema_extra=Common)
    epochs: Epochs | None = Field(
        None, description="passes over the training images; default: 20", json_schema_extra=Common
    )
    steps: Count | None = Field(None, description="training steps, instead of --epochs", json_schema_extra=Common)
    lr: LearningRate = Field(1e-3, description="peak learning rate of AdamW", json_schema_extra=Common)
    weight_decay: WeightDecay = Field(1e-4, description="weight decay of AdamW")
    warmup: float = Field(0.0375, ge=0, lt=1, description="share of the training steps that warm up")
    crop_min: float = Field(0.2, gt=0, le=1, description="smallest area of a crop, as a share of a test window's area")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    ignore_index: int | None = Field(255, ge=0, lt=2**32, description="mask value of pixels without a class, or none")
    reduce_zero_label: bool | None = Field(
        None, description="mask value 0 means no class, and v means class v - 1; default: only for ADE20K's layout"
    )
    mode: Literal["slide", "whole"] = Field(
        "slide", description="test by averaged windows of the input's size (slide) or on the resized image (whole)"
    )
    short_side: int | None = Field(
        None,
        ge=1,
        le=2**14,
        description="slide: an image's shorter side in pixels; at least and by default the input's",
    )
    overlap: float = Field(1 / 3, ge=0, lt=1, description="slide: share of a window that the next window shows too")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.mode == "whole" and self.short_side is not None:
            raise ValueError("short_side is for mode slide; leave it out with whole")
        return self

    def total_steps(self, images: int) -> int:
        """Return the number of training steps for so many training images."""
        return self.steps if self.steps is not None else (self.epochs or 20) * (images // self.batch_size)
