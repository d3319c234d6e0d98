"""The configurations of the tokenizer commands."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mapet.config.base import Common, StrictConfig
from mapet.config.keys import (
    BatchSize,
    InputKeys,
    KMeansKeys,
    PatchKeys,
    TeacherKeys,
    TokenizerKeys,
    TrainKeys,
    ViewKeys,
    VocabSize,
)


class FitConfig(PatchKeys, KMeansKeys, InputKeys):
    """A tokenizer fitted by k-means."""

    teacher: str = Field(
        "pixels",
        min_length=1,
        description="what is clustered: 'pixels', or the features of a timm or torchvision model by name, or of the "
        "exported folder of an earlier run",
        json_schema_extra=Common,
    )
    crop_min: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fit on random crops that cover at least this share of an image; default: on the centre square",
    )
    batch_size: BatchSize = Field(64, description="images at a time, per process")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self.check_teacher(self.teacher)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        return self


class EncodeConfig(ViewKeys, TokenizerKeys):
    """A token store."""

    views: int = Field(
        8,
        ge=1,
        le=10_000,
        description="distinct crops of each image, so that augmentation stays possible",
        json_schema_extra=Common,
    )
    batch_size: BatchSize = Field(64, description="views at a time, per process")


class ReportConfig(TokenizerKeys):
    """A report on a tokenizer."""


class CheckConfig(StrictConfig):
    """A verification of a token store."""

    tokens: str = Field(min_length=1, description="the token store", json_schema_extra=Common)
    data: str | None = Field(
        None,
        min_length=1,
        description="the images; left out, only the store itself is verified",
        json_schema_extra=Common,
    )
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="the tokenizer it was made with; default: where it was",
        json_schema_extra=Common,
    )
    teacher_weights: str | None = Field(
        None, description="of a published tokenizer: a file, a URL or hf-hub:OWNER/REPO/FILE"
    )
    workers: int | None = Field(None, ge=0, le=1024, description="processes that read images; default: chosen by cores")


class VQKDConfig(PatchKeys, TrainKeys, TeacherKeys, InputKeys):
    """A VQ-KD tokenizer trained on one's own images (BEiT v2, 2208.06366)."""

    teacher: str = Field(
        min_length=1,
        description="whose features are distilled: a timm or torchvision model by name, or the exported folder of an "
        "earlier run",
        json_schema_extra=Common,
    )
    vocab_size: VocabSize = Field(8192, description="how many ids", json_schema_extra=Common)
    code_dim: int = Field(32, ge=1, le=2**14, description="width of a code")
    embed_dim: int = Field(
        768, ge=1, le=2**14, description="width of encoder and decoder; a multiple of 64, or of the heads"
    )
    depth: int = Field(12, ge=1, le=1000, description="blocks of the encoder")
    num_heads: int = Field(12, ge=1, le=2**10, description="attention heads")
    decoder_depth: Literal[1, 3] = Field(3, description="blocks of the decoder")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="how slowly codes follow the patches they stand for")
    crop_min: float = Field(0.2, gt=0, le=1, description="least share of the image that a random crop covers")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    color_jitter: float = Field(0.0, ge=0, le=1, description="colour jitter of the encoder's view")
