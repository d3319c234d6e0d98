"""The configuration of ``mapet eval segment``."""

from collections.abc import Mapping
from typing import Any, Literal

from mapet.config.base import key
from mapet.config.keys import (
    BatchSize,
    Count,
    DataKeys,
    Epochs,
    LearningRate,
    NetworkKeys,
    PrecisionKeys,
    Share,
    Text,
    WeightDecay,
)


class SegmentConfig(NetworkKeys, PrecisionKeys, DataKeys):
    """A head on frozen patch features, trained and measured on images with masks of class ids."""

    data: Text = key(..., "a folder with images/ and masks/, or ADE20K's", common=True)
    head: Literal["linear", "conv"] = key(
        "linear", "linear, or conv (a 3x3 convolution to 256 channels comes first)", common=True
    )
    classes: int | None = key(None, "default: one more than the greatest id in the masks", common=True, ge=2, le=4096)
    seeds: int = key(1, "number of heads, with seeds from --seed", common=True, ge=1, le=100)
    batch_size: BatchSize = key(16, "crops per step; windows at a time", common=True)
    epochs: Epochs | None = key(None, "passes over the training images; default: 20", common=True, instead_of="steps")
    steps: Count | None = key(None, "training steps, instead of --epochs", common=True, instead_of="epochs")
    lr: LearningRate = key(1e-3, "peak learning rate of AdamW", common=True)
    weight_decay: WeightDecay = key(1e-4, "weight decay of AdamW")
    warmup: float = key(0.0375, "share of the training steps that warm up", ge=0, lt=1)
    crop_min: float = key(0.2, "smallest area of a crop, as a share of a test window's area", gt=0, le=1)
    flip: Share = key(0.5, "probability of a horizontal flip")
    ignore_index: int | None = key(255, "mask value of pixels without a class, or none", ge=0, lt=2**32)
    reduce_zero_label: bool | None = key(
        None, "mask value 0 means no class, and v means class v - 1; default: only for ADE20K's layout"
    )
    mode: Literal["slide", "whole"] = key(
        "slide", "test by averaged windows of the input's size (slide) or on the resized image (whole)"
    )
    short_side: int | None = key(
        None, "slide: an image's shorter side in pixels; at least and by default the input's", ge=1, le=2**14
    )
    overlap: float = key(1 / 3, "slide: share of a window that the next window shows too", ge=0, lt=1)

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Refuse values that do not go together."""
        if given.get("epochs") is not None and given.get("steps") is not None:
            raise ValueError("give epochs or steps, not both")
        if given.get("mode") == "whole" and given.get("short_side") is not None:
            raise ValueError("short_side is for mode slide; leave it out with whole")

    def total_steps(self, images: int) -> int:
        """Return the number of training steps for so many training images."""
        return self.steps if self.steps is not None else (self.epochs or 20) * (images // self.batch_size)
