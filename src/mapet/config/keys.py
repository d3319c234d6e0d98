"""Groups of keys that several configurations have in common."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mapet.config.base import Common, Free, StrictConfig
from mapet.errors import MapetError

# Upper bounds are far above what is of use, and below what would fail late, or overflow.
Pixels = Annotated[int, Field(ge=1, le=4096)]
BatchSize = Annotated[int, Field(ge=1, le=2**16)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Epochs = Annotated[int, Field(ge=1, le=10**6)]
VocabSize = Annotated[int, Field(ge=2, le=2**20)]
LearningRate = Annotated[float, Field(gt=0, le=1e3)]
LeastRate = Annotated[float, Field(ge=0, le=1e3)]
WeightDecay = Annotated[float, Field(ge=0, le=1e3)]
# YAML reads a bare no as false.
NoIsAWord = BeforeValidator(lambda value: "no" if value is False else value)


# Of defaults: the steps that a batch leaves an epoch, and the batch below which the learning rate falls no further.
LEAST_STEPS_PER_EPOCH, LEAST_SCALED_BATCH = 10, 32


class DataKeys(StrictConfig):
    """Which images, and how they are read."""

    data: str = Field(
        min_length=1,
        description="a folder of images (nested, unlabelled), a text file of paths, or a demo set "
        "(mnist, fashion-mnist)",
        json_schema_extra={**Common, **Free},  # guarded by a fingerprint of the images instead
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seeds everything that is random", json_schema_extra=Common)
    max_damaged: float = Field(
        0.1,
        ge=0,
        le=1,
        description="stop when more than this share of the images cannot be read",
        json_schema_extra=Free,
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="processes that load images; default: chosen by cores and device",
        json_schema_extra=Free,
    )


class InputKeys(DataKeys):
    """What the networks get."""

    channels: int = Field(3, description="1 (grey) or 3 (RGB): what images are converted to")


class NetworkKeys(StrictConfig):
    """A trained model, and the size of its input."""

    model: str = Field(
        min_length=1,
        description="a run folder, an exported folder, or the name of a timm model or of one that comes with mapet "
        "(also local-dir:FOLDER, hf-hub:ID)",
        json_schema_extra=Common,
    )
    image_size: tuple[Pixels, Pixels] | None = Field(
        None,
        description="side of the input in pixels, or rows x columns as 192x256; position embeddings are resized; "
        "default: the model's",
        json_schema_extra=Common,
    )
    reinit: bool = Field(False, description="random weights instead of the model's own: what is to be beaten")

    @field_validator("image_size", mode="before")
    @classmethod
    def _one_side_or_two(cls, value: object) -> object:
        if isinstance(value, int) and not isinstance(value, bool):
            value = (value, value)
        elif isinstance(value, str):
            parts = value.lower().split("x")
            if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
                raise ValueError("write a number of pixels, or ROWSxCOLUMNS such as 192x256")
            value = tuple(int(part) for part in (parts * 2)[:2])
        return value


class ModelKeys(NetworkKeys):
    """A trained model, and how images are put into it."""

    crop_pct: float | None = Field(
        None, ge=0.01, le=1, description="share of the resized image's side that the model sees; default: the model's"
    )


class PrecisionKeys(StrictConfig):
    """The arithmetic of a network that is applied."""

    precision: Annotated[Literal["no", "bf16", "fp16"], NoIsAWord] = Field(
        "no", description="precision of the network; no: float32"
    )


class InferenceKeys(ModelKeys, PrecisionKeys, DataKeys):
    """A trained model applied to images, in order."""

    batch_size: BatchSize = Field(256, description="images at a time", json_schema_extra=Common)


class PatchKeys(StrictConfig):
    """The student's grid."""

    image_size: Pixels = Field(224, description="side of the student's input in pixels", json_schema_extra=Common)
    patch_size: Pixels = Field(16, description="side of the student's patches in pixels", json_schema_extra=Common)


class TokenizerKeys(DataKeys):
    """A tokenizer that there is, and the images it is given."""

    tokenizer: str = Field(
        min_length=1, description="the folder of a tokenizer, or 'dvae' or 'vqkd' (published)", json_schema_extra=Common
    )
    teacher_weights: str | None = Field(
        None, description="of a published tokenizer: a file, a URL or hf-hub:OWNER/REPO/FILE"
    )
    channels: int | None = Field(
        None, description="1 (grey) or 3 (RGB): what images are converted to; default: as the tokenizer reads them"
    )


class TeacherKeys(StrictConfig):
    """Which part of a teacher is asked, and how."""

    teacher_stage: str | int | None = Field(
        None,
        description="where to cut the teacher: a stage's or block's number (timm; -1: the last) or a node's name "
        "(torchvision)",
    )
    teacher_size: Pixels | None = Field(
        None, description="side of the teacher's input in pixels; default: --image-size"
    )
    teacher_weights: str | None = Field(
        None,
        description="weights of the teacher or of a published tokenizer: a file, a URL or hf-hub:OWNER/REPO/FILE, "
        "perhaps with #sha256=HEX; default: the published ones",
    )


class KMeansKeys(TeacherKeys):
    """How a codebook is fitted by k-means."""

    vocab_size: VocabSize | None = Field(
        None,
        description="ids of a tokenizer to be fitted; default: as many as the data supports, up to 8192 (pixels: 1024)",
    )
    contrast: bool = Field(True, description="k-pixels: normalise each patch to mean 0, variance 1")
    spherical: bool = Field(False, description="k-means by direction: features are scaled to length 1")
    kmeans_iterations: int = Field(20, ge=1, le=10**4, description="iterations of k-means")
    kmeans_restarts: int = Field(1, ge=1, le=1000, description="runs of k-means, of which the best is kept")
    points_per_centroid: Count | None = Field(
        None, description="patches sampled for each id; default: up to 256, fewer where k-means would take hours"
    )
    sample_gib: float = Field(4.0, gt=0, le=2**20, description="most memory for the sampled patches, in GiB")

    def check_teacher(self, name: str | None) -> None:
        """Raise ValueError if something is said of a teacher that there is not."""
        if name in (None, "pixels"):
            for key in TeacherKeys.model_fields:
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is given, but there is no teacher; name one")


class ViewKeys(StrictConfig):
    """How an image is cropped; keys left out are those of the token store, if there is one."""

    crop_min: float | None = Field(
        None, gt=0, le=1, description="least share of the image that a random crop covers; default: 0.2"
    )
    flip: float | None = Field(None, ge=0, le=1, description="probability of a horizontal flip; default: 0.5")
    mirror: bool | None = Field(
        None, description="with --views: each crop in both orientations, whatever --flip; default: false"
    )

    @property
    def view_settings(self) -> dict[str, float | bool]:
        """The keys above, with their defaults."""
        return {
            "crop_min": 0.2 if self.crop_min is None else self.crop_min,
            "flip": 0.5 if self.flip is None else self.flip,
            "mirror": bool(self.mirror),
        }


class TrainKeys(DataKeys):
    """How the loop trains, whatever it trains."""

    default_epochs: ClassVar[int] = 300

    batch_size: BatchSize = Field(
        256,
        description="images per optimiser step, over all devices; if not given, fewer for fewer than 2,560 images, so "
        "that an epoch has ten steps or more",
        json_schema_extra=Common,
    )
    epochs: Epochs | None = Field(
        None, description="passes over the data; default: see --steps", json_schema_extra=Common
    )
    steps: Count | None = Field(
        None, description="optimiser steps, instead of --epochs; without both 300 epochs", json_schema_extra=Common
    )
    lr: LearningRate | None = Field(
        None,
        description="peak learning rate; by default the paper's 1.5e-3 at batch 2048, scaled by the square root "
        "of the batch size, of 32 images at least",
        json_schema_extra=Common,
    )
    min_lr: LeastRate = Field(1e-5, description="learning rate at the end of the cosine")
    warmup_lr: LeastRate = Field(1e-6, description="learning rate at the first step")
    warmup: float = Field(10 / 300, ge=0, lt=1, description="share of the run that warms up")
    weight_decay: WeightDecay = Field(0.05, description="AdamW's weight decay")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW's second beta (the first is 0.9)")
    clip_grad: float = Field(
        3.0, gt=0, le=1e30, description="largest gradient norm; above it gradients are scaled down"
    )
    accumulate: BatchSize = Field(1, description="micro-batches per optimiser step; saves memory")
    precision: Annotated[Literal["auto", "no", "bf16", "fp16"], NoIsAWord] = Field(
        "auto", description="mixed precision; auto: bf16 where the device has it fast, else no"
    )
    checkpoint_every: Count | None = Field(
        None, description="optimiser steps between checkpoints; default: one epoch", json_schema_extra=Free
    )
    log_every: Count = Field(1, description="optimiser steps between lines of metrics.jsonl", json_schema_extra=Free)

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if "batch_size" in self.model_fields_set and self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        return self

    @property
    def peak_lr(self) -> float:
        """The given peak learning rate, or the paper's scaled to the batch size."""
        return self.lr if self.lr is not None else 1.5e-3 * self.lr_scale(2048)

    def lr_scale(self, published_batch: int) -> float:
        """Return what multiplies the learning rate that was published for another batch size.

        Adam's steps do not grow with the gradient, so noise, not size, sets the rate: hence the root
        (Malladi et al., 2205.10287) where the linear rule belongs to SGD.
        """
        return math.sqrt(max(self.batch_size, LEAST_SCALED_BATCH) / published_batch)

    @property
    def images_together(self) -> int:
        """What the size of a micro-batch must be a multiple of."""
        return 1

    def resolve(self, images: int, processes: int = 1) -> Self:
        """Fill in what has a default depending on other values, so that a saved file says it all.

        Args:
            images: size of the data set.
            processes: that train together.

        Raises:
            MapetError: if a batch is larger than the data set, or cannot be shared out evenly.
        """
        parts = processes * self.accumulate
        shared = f"among {processes} processes with {self.accumulate} micro-batches each"
        if images < parts * self.images_together:
            raise MapetError(
                f"{images} images are too few to be shared out {shared}, {self.images_together} at a time; add images, "
                "or take fewer processes and micro-batches"
            )
        batch_size = self.batch_size
        if "batch_size" not in self.model_fields_set:
            batch_size = self._default_batch(images, parts * self.images_together)
        if batch_size > images:
            raise MapetError(
                f"batch size {batch_size} is larger than the data set of {images} images; pass --batch-size {images} "
                "or less"
            )
        if batch_size % parts:
            raise MapetError(f"batch size {batch_size} cannot be divided {shared}; take a multiple of {parts}")
        config = self.model_copy(update={"batch_size": batch_size})
        epochs = self.epochs if self.epochs is not None or self.steps is not None else self.default_epochs
        update = {
            "epochs": epochs,
            "lr": config.peak_lr,
            "checkpoint_every": self.checkpoint_every or images // batch_size,
        }
        return config.model_copy(update=update)

    def _default_batch(self, images: int, unit: int) -> int:
        """Return the multiple of ``unit`` nearest below what leaves ten steps an epoch, and at least one."""
        power_of_two = 1 << max(1, (images // LEAST_STEPS_PER_EPOCH).bit_length() - 1)
        return max(1, min(self.batch_size, power_of_two, images) // unit) * unit

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "resolve() sets epochs or steps"
        return self.epochs * (images // self.batch_size)
