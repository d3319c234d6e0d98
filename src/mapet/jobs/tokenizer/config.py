"""The configurations of the tokenizer commands."""

from collections.abc import Mapping
from typing import Any

from mapet.config.base import Config, default_of, key
from mapet.config.keys import (
    BatchSize,
    InputKeys,
    KMeansKeys,
    OneOrThree,
    PatchKeys,
    Share,
    TeacherKeys,
    Text,
    TokenizerKeys,
    TrainKeys,
    ViewKeys,
    VocabSize,
    check_teacher,
)


class FitConfig(PatchKeys, KMeansKeys, InputKeys):
    """A tokenizer fitted by k-means."""

    teacher: Text = key(
        "pixels",
        "what is clustered: 'pixels', or the features of a timm or torchvision model by name, or of the exported "
        "folder of an earlier run",
        common=True,
    )
    crop_min: float | None = key(
        None,
        "fit on random crops that cover at least this share of an image; default: on the centre square",
        gt=0,
        le=1,
    )
    batch_size: BatchSize = key(64, "images at a time, per process")

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Refuse values that do not go together."""
        check_teacher(given, given.get("teacher"))
        image, patch = (given.get(name, default_of(cls, name)) for name in ("image_size", "patch_size"))
        if image % patch:
            raise ValueError(f"image_size {image} is not divisible by patch_size {patch}")


class EncodeConfig(ViewKeys, TokenizerKeys):
    """A token store."""

    views: int = key(
        8, "distinct crops of each image, so that augmentation stays possible", common=True, ge=1, le=10_000
    )
    batch_size: BatchSize = key(64, "views at a time, per process")


class ReportConfig(TokenizerKeys):
    """A report on a tokenizer."""


class CheckConfig(Config):
    """A verification of a token store."""

    tokens: Text = key(..., "the token store", common=True)
    data: Text | None = key(None, "the images; left out, only the store itself is verified", common=True)
    tokenizer: Text | None = key(
        None, "the tokenizer that the store was made with; default: where it was then", common=True
    )
    teacher_weights: str | None = key(None, "of a published tokenizer: a file, a URL or hf-hub:OWNER/REPO/FILE")
    workers: int | None = key(None, "processes that read images; default: chosen by cores", ge=0, le=1024)


class VQKDConfig(PatchKeys, TrainKeys, TeacherKeys, InputKeys):
    """A VQ-KD tokenizer trained on one's own images (BEiT v2, 2208.06366)."""

    teacher: Text = key(
        ...,
        "whose features are distilled: a timm or torchvision model by name, or the exported folder of an earlier run",
        common=True,
    )
    vocab_size: VocabSize = key(8192, "how many ids", common=True)
    code_dim: int = key(32, "width of a code", ge=1, le=2**14)
    embed_dim: int = key(768, "width of encoder and decoder; a multiple of 64, or of the heads", ge=1, le=2**14)
    depth: int = key(12, "blocks of the encoder", ge=1, le=1000)
    num_heads: int = key(12, "attention heads", ge=1, le=2**10)
    decoder_depth: OneOrThree = key(3, "blocks of the decoder: 1 or 3")
    ema_decay: float = key(0.99, "how slowly codes follow the patches they stand for", ge=0, lt=1)
    crop_min: float = key(0.2, "least share of the image that a random crop covers", gt=0, le=1)
    flip: Share = key(0.5, "probability of a horizontal flip")
    color_jitter: Share = key(
        0.0, "jitter of the encoder's view: brightness, contrast and, of 3 channels only, saturation"
    )
