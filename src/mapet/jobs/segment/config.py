"""The configuration of ``mapet eval segment``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mapet.config.base import Common, StrictConfig
from mapet.config.keys import BatchSize, Count, DataKeys, Epochs, LearningRate, NetworkKeys, PrecisionKeys, WeightDecay


class MaskKeys(StrictConfig):
    """What the values of masks mean."""

    classes: int | None = Field(
        None,
        ge=2,
        le=4096,
        description="number of classes; default: as the training masks have it, one more than their greatest",
        json_schema_extra=Common,
    )
    ignore_index: int | None = Field(
        255, ge=0, lt=2**32, description="value of pixels that are of no class; none: there is no such value"
    )
    reduce_zero_label: bool | None = Field(
        None,
        description="0 is of no class either, and value v is class v - 1; default: true for ADE20K's layout, else "
        "false",
    )


class SegmentConfig(MaskKeys, NetworkKeys, PrecisionKeys, DataKeys):
    """A head on frozen patch features, trained and measured on images with masks."""

    data: str = Field(
        min_length=1,
        description="a folder with images/ and masks/, perhaps with train and val in both; or ADE20K's",
        json_schema_extra=Common,
    )
    head: Literal["linear", "conv"] = Field(
        "linear",
        description="linear (of each patch alone) or conv (a 3x3 convolution to 256 channels comes first)",
        json_schema_extra=Common,
    )
    seeds: int = Field(
        1, ge=1, le=100, description="so many heads, from --seed on: the mean and the spread", json_schema_extra=Common
    )
    batch_size: BatchSize = Field(
        16, description="crops a training step; in evaluation windows at a time", json_schema_extra=Common
    )
    epochs: Epochs | None = Field(
        None, description="passes over the training images; default: 20, or see --steps", json_schema_extra=Common
    )
    steps: Count | None = Field(None, description="training steps, instead of --epochs", json_schema_extra=Common)
    lr: LearningRate = Field(1e-3, description="peak learning rate of AdamW", json_schema_extra=Common)
    weight_decay: WeightDecay = Field(1e-4, description="AdamW's weight decay")
    warmup: float = Field(0.0375, ge=0, lt=1, description="share of the training that warms up")
    crop_min: float = Field(
        0.2, gt=0, le=1, description="least area of a training crop, as a share of what a window shows in evaluation"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    mode: Literal["slide", "whole"] = Field(
        "slide",
        description="how images are evaluated: slide (overlapping windows of the input's size, averaged) or "
        "whole (the image is resized to the input)",
    )
    short_side: int | None = Field(
        None,
        ge=1,
        le=2**14,
        description="slide: what an image's shorter side is resized to, in pixels; at least, and by default, the "
        "input's",
    )
    overlap: float = Field(1 / 3, ge=0, lt=1, description="slide: share of a window that the next one shows too")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.mode == "whole" and self.short_side is not None:
            raise ValueError("short_side is for mode slide; leave it out with whole")
        return self

    def total_steps(self, images: int) -> int:
        """Training steps on so many images."""
        return self.steps if self.steps is not None else (self.epochs or 20) * (images // self.batch_size)
