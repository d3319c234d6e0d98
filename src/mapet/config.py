"""The configuration of a pre-training run: strict, typed, flat, every key documented.

Keys are the names of the command line's flags and of the YAML recipes' entries alike.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from mapet.errors import MapetError, nearest

# Marks on fields: shown first by --help; may change on resume, since it does not touch what is computed.
Common: dict[str, JsonValue] = {"common": True}
Free: dict[str, JsonValue] = {"free": True}


class PretrainConfig(BaseModel):
    """What decides a run. Unknown keys are errors; ``resolve`` fills in what depends on the data."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    data: str = Field(
        min_length=1,
        description="a folder of images (nested, unlabelled), a text file of paths, or a demo set "
        "(mnist, fashion-mnist)",
        json_schema_extra={**Common, **Free},  # guarded by a fingerprint of the images instead
    )
    model: str = Field(
        "vit_small_patch16_224", description="a timm Vision Transformer by name", json_schema_extra=Common
    )
    image_size: int = Field(224, ge=1, description="side of the square input in pixels", json_schema_extra=Common)
    tokenizer: str = Field(
        "pixels",
        min_length=1,
        description="'pixels', a timm or torchvision model name (k-means over its features), or the folder of a "
        "fitted tokenizer",
        json_schema_extra=Common,
    )
    objective: str = Field("mapet", description="mapet, pim, mim or raster", json_schema_extra=Common)
    epochs: int | None = Field(
        None, ge=1, description="passes over the data; 300 unless --steps is given", json_schema_extra=Common
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps, instead of --epochs", json_schema_extra=Common)
    batch_size: int = Field(
        256, ge=1, description="images per optimiser step, over all devices", json_schema_extra=Common
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="peak learning rate; by default the paper's 1.5e-3 at batch 2048, scaled by the square root "
        "of the batch size",
        json_schema_extra=Common,
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seeds everything that is random", json_schema_extra=Common)

    patch_size: int | None = Field(None, ge=1, description="side of a patch in pixels; default: the model's")
    channels: int = Field(3, description="1 (grey) or 3 (RGB): what images are converted to")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth rate of the last block")
    layer_scale: float | None = Field(0.1, gt=0, description="initial LayerScale; null (flag: none): the model's own")
    model_args: dict[str, int | float | bool | str] = Field(
        default_factory=dict, description="further arguments of timm's VisionTransformer, as depth=4 embed_dim=128"
    )

    context_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens given, class and register tokens included; default: the objective's (mapet: a quarter)",
    )
    order: str | None = Field(
        None, description="how targets are chosen and visited: random, blockwise, raster; default: the objective's"
    )

    vocab_size: int | None = Field(
        None,
        ge=2,
        description="ids of a tokenizer to be fitted; default: as many as the data supports, up to 8192 (pixels: 1024)",
    )
    contrast: bool = Field(True, description="tokenizer 'pixels': normalise each patch to mean 0, variance 1")
    teacher_stage: str | int | None = Field(
        None, description="where to cut the teacher: a stage's number (timm) or a node's name (torchvision)"
    )
    teacher_size: int | None = Field(
        None, ge=1, description="side of the teacher's input in pixels; default: --image-size"
    )
    teacher_weights: str | None = Field(None, description="a local file with the teacher's weights")

    crop_min: float = Field(0.2, gt=0, le=1, description="least share of the image that a random crop covers")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    color_jitter: float = Field(0.4, ge=0, le=1, description="colour jitter of the student's view")
    mean: tuple[float, ...] | None = Field(None, description="input mean per channel; default: ImageNet's")
    std: tuple[float, ...] | None = Field(None, description="input deviation per channel; default: ImageNet's")
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

    min_lr: float = Field(1e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_lr: float = Field(1e-6, ge=0, description="learning rate at the first step")
    warmup: float = Field(10 / 300, ge=0, lt=1, description="share of the run that warms up")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's weight decay")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW's second beta (the first is 0.9)")
    clip_grad: float = Field(3.0, gt=0, description="largest gradient norm; above it gradients are scaled down")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimiser step; saves memory")
    precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto", description="mixed precision; auto: bf16 where the device has it fast, else no"
    )

    checkpoint_every: int | None = Field(
        None, ge=1, description="optimiser steps between checkpoints; default: one epoch", json_schema_extra=Free
    )
    log_every: int = Field(
        1, ge=1, description="optimiser steps between lines of metrics.jsonl", json_schema_extra=Free
    )
    eval_data: str | None = Field(
        None,
        min_length=1,
        description="labelled images to measure k-NN and a linear probe on: class folders, or a demo set",
        json_schema_extra=Free,
    )
    eval_every: int = Field(
        10, ge=1, description="epochs between evaluations (and one at the end)", json_schema_extra=Free
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: object) -> object:
        return "no" if value is False else value  # YAML reads a bare no as false

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channel(s)")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.tokenizer == "pixels":
            for name in ("teacher_stage", "teacher_size", "teacher_weights"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is given, but tokenizer 'pixels' has no teacher")
        return self

    @property
    def peak_lr(self) -> float:
        """The given peak learning rate, or the paper's scaled by the square root of the batch size.

        Adam's steps do not grow with the gradient, so noise, not size, sets the rate: hence the root
        (Malladi et al., 2205.10287) where the linear rule belongs to SGD.
        """
        return self.lr if self.lr is not None else 1.5e-3 * math.sqrt(self.batch_size / 2048)

    @property
    def input_mean(self) -> tuple[float, ...]:
        """Per-channel mean of the student's input."""
        return self.mean or ((0.485, 0.456, 0.406) if self.channels == 3 else (0.449,))

    @property
    def input_std(self) -> tuple[float, ...]:
        """Per-channel deviation of the student's input."""
        return self.std or ((0.229, 0.224, 0.225) if self.channels == 3 else (0.226,))

    def resolve(self, images: int) -> PretrainConfig:
        """Fill in everything that has a default depending on other values, so that a saved file says it all.

        Args:
            images: size of the data set.

        Raises:
            MapetError: if a batch is larger than the data set.
        """
        if self.batch_size > images:
            raise MapetError(
                f"batch size {self.batch_size} is larger than the data set of {images} images; "
                f"pass --batch-size {images} or less"
            )
        steps_per_epoch = images // self.batch_size
        epochs = self.epochs if self.epochs is not None or self.steps is not None else 300
        return self.model_copy(
            update={
                "epochs": epochs,
                "lr": self.peak_lr,
                "mean": self.input_mean,
                "std": self.input_std,
                "checkpoint_every": self.checkpoint_every or steps_per_epoch,
            }
        )

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "resolve() sets epochs or steps"
        return self.epochs * (images // self.batch_size)


def free_keys() -> frozenset[str]:
    """Keys that may change when a run is resumed."""
    return frozenset(name for name in PretrainConfig.model_fields if has_mark(name, "free"))


def has_mark(key: str, mark: str) -> bool:
    """Whether a key's definition carries ``mark`` ("common" or "free")."""
    extra = PretrainConfig.model_fields[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


def make_config(values: dict[str, Any], origin: str = "the configuration") -> PretrainConfig:
    """Validate values by key.

    Raises:
        MapetError: naming the first wrong key, what is wrong, and for an unknown key the nearest valid one.
    """
    try:
        return PretrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(key, PretrainConfig.model_fields) or "; see mapet pretrain --help"
            raise MapetError(f"{origin} has the unknown key {key!r}{hint}") from None
        if first["type"] == "missing":
            raise MapetError(f"{origin} lacks {key!r}: say which images to train on") from None
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        where = f"{key} = {first['input']!r}: " if key else ""
        raise MapetError(f"{origin} is wrong: {where}{message}") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML file of configuration values, unvalidated.

    Raises:
        MapetError: if the file is missing or is no YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise MapetError(f"recipe {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MapetError(f"recipe {path} cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise MapetError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise MapetError(f"recipe {path} must hold 'key: value' lines, but it is a {type(values).__name__}")
    return values


def config_to_yaml(config: PretrainConfig) -> str:
    """Write a configuration as YAML, in the order of the definition."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
