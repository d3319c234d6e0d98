"""The configuration of fine-tuning; the defaults are upstream's recipe for ViT-Base."""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from mapet.config.base import Common, Free
from mapet.config.keys import BatchSize, Count, LearningRate, LeastRate, ModelKeys, TrainKeys
from mapet.errors import MapetError


class FinetuneConfig(TrainKeys, ModelKeys):
    """What decides a fine-tuning."""

    default_epochs: ClassVar[int] = 100

    data: str = Field(
        min_length=1,
        description="labelled images: one subfolder per class, perhaps below train and test (or val), or a demo set",
        json_schema_extra={**Common, **Free},  # guarded by a fingerprint of images and labels instead
    )
    label_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each class's labels that is used, at least one; 1: all",
        json_schema_extra=Common,
    )
    labels_per_class: Count | None = Field(
        None, description="labels of each class that are used; default: all", json_schema_extra=Common
    )
    steps: Count | None = Field(
        None, description="optimiser steps, instead of --epochs; without both 100 epochs", json_schema_extra=Common
    )
    batch_size: BatchSize = Field(
        512,
        description="images per optimiser step, over all devices; if not given, fewer for fewer than 5,120 images, so "
        "that an epoch has ten steps or more",
        json_schema_extra=Common,
    )
    lr: LearningRate | None = Field(
        None,
        description="peak learning rate; by default upstream's 5e-4 at batch 512, scaled by the square root of the "
        "batch size, of 32 images at least",
        json_schema_extra=Common,
    )
    min_lr: LeastRate = Field(1e-6, description="learning rate at the end of the cosine")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of the run that warms up")
    layer_decay: float | None = Field(
        0.65,
        gt=0,
        le=1,
        description="the learning rate shrinks by this factor from each block to the one before it; null (flag: none): "
        "the same for all",
    )
    pool: Literal["mean", "class"] | None = Field(
        None, description="what the classifier reads: the mean over patches or the class token; default: the model's"
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth rate of the last block")
    crop_pct: float | None = Field(
        0.9, ge=0.01, le=1, description="share of the resized image's side that is seen when the model is measured"
    )
    crop_min: float = Field(0.08, gt=0, le=1, description="least share of the image that a random crop covers")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    augment: str | None = Field(
        "rand-m9-mstd0.5-inc1",
        description="timm's name of an augmentation policy; null (flag: none): colour jitter only",
    )
    color_jitter: float = Field(0.4, ge=0, le=1, description="colour jitter, where there is no --augment")
    erasing: float = Field(0.25, ge=0, le=1, description="probability of erasing a rectangle")
    mixup: float = Field(0.8, ge=0, le=1e3, description="alpha of mixup; 0: none")
    cutmix: float = Field(1.0, ge=0, le=1e3, description="alpha of cutmix, which alternates with mixup; 0: none")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="moving average of the weights, which is then measured and exported, as 0.9999"
    )
    eval_every: Count | None = Field(
        None,
        description="epochs between measurements on the test part (and one at the end); default: a tenth of the run",
        json_schema_extra=Free,
    )

    @field_validator("augment")
    @classmethod
    def _known_policy(cls, name: str | None) -> str | None:
        # timm passes over what it does not understand in such a name.
        if name is not None and not re.fullmatch(
            r"rand(-(m|n|p|mstd|mmax|inc)\d+(\.\d+)?)*|augmix(-(m|w|d|a|b|mstd)\d+(\.\d+)?)*"
            r"|(original|originalr|v0|v0r|3a)(-mstd\d+(\.\d+)?)?",
            name,
        ):
            raise ValueError("none of timm's policies; take for instance rand-m9-mstd0.5-inc1, augmix-m5 or none")
        return name

    @model_validator(mode="after")
    def _one_way_of_few(self) -> Self:
        if self.label_share is not None and self.labels_per_class is not None:
            raise ValueError("give label_share or labels_per_class, not both")
        return self

    @property
    def peak_lr(self) -> float:
        """The given peak learning rate, or upstream's scaled to the batch size."""
        return self.lr if self.lr is not None else 5e-4 * self.lr_scale(512)

    @property
    def images_together(self) -> int:
        """What the size of a micro-batch must be a multiple of: mixup and cutmix pair images."""
        return 2 if self.mixup or self.cutmix else 1

    def resolve(self, images: int, processes: int = 1) -> Self:
        """Fill in what has a default depending on other values; see ``TrainKeys.resolve``."""
        config = super().resolve(images, processes)
        parts = processes * self.accumulate
        together = config.batch_size // parts
        if together % self.images_together:
            raise MapetError(
                f"mixup and cutmix pair the images of a batch, so {together} at a time is odd; take --batch-size "
                f"{config.batch_size + parts}, or --mixup 0 --cutmix 0"
            )
        epochs = config.total_steps(images) // (images // config.batch_size)
        return config.model_copy(update={"eval_every": self.eval_every or max(1, epochs // 10)})
