"""The configuration of a pre-training run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from mapet.config.base import Common, Free
from mapet.config.keys import Count, InputKeys, KMeansKeys, Pixels, TrainKeys, ViewKeys

MOST_MODEL_ARGUMENT = 2**14  # a depth or a width


class PretrainConfig(TrainKeys, ViewKeys, KMeansKeys, InputKeys):
    """What decides a run. ``resolve`` fills in what depends on the data."""

    init: str | None = Field(
        None,
        min_length=1,
        description="weights to begin with: a run, an exported or converted folder, or the name of a timm model or of "
        "one that comes with mapet; its architecture, sizes and normalisation are then the defaults",
        json_schema_extra=Common,
    )
    init_parts: Literal["backbone", "all"] = Field(
        "backbone", description="all: begin with the mask vector and the head of --init as well, for the same tokenizer"
    )
    model: str = Field(
        "vit_small_patch16_224", description="a timm Vision Transformer by name", json_schema_extra=Common
    )
    image_size: Pixels = Field(224, description="side of the square input in pixels", json_schema_extra=Common)
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="'pixels' (the default), a timm or torchvision model name or the exported folder of an earlier "
        "run (k-means over its features), 'dvae' or 'vqkd' (published), or the folder of a fitted tokenizer",
        json_schema_extra=Common,
    )
    tokens: str | None = Field(
        None,
        min_length=1,
        description="a token store of these images (mapet tokenizer encode), instead of tokenizing at each step",
        json_schema_extra=Common,
    )
    objective: str = Field(
        "mapet",
        description="mapet, pim, mim, raster or cae, which predict ids of a tokenizer; mae or simmim, which predict "
        "pixels and take no tokenizer",
        json_schema_extra=Common,
    )

    patch_size: Pixels | None = Field(None, description="side of a patch in pixels; default: the model's")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth rate of the last block")
    layer_scale: float | None = Field(
        0.1, gt=0, le=1e3, description="initial LayerScale; null (flag: none): the model's own"
    )
    model_args: dict[str, int | float | bool | str] = Field(
        default_factory=dict, description="further arguments of timm's VisionTransformer, as depth=4 embed_dim=128"
    )
    context_tokens: Count | None = Field(
        None,
        description="tokens given, class and register tokens included; default: the objective's (mapet: a quarter)",
    )
    order: str | None = Field(
        None,
        description="how targets are chosen and visited: random, blockwise, cells, raster, spiral; default: the "
        "objective's",
    )
    objective_args: dict[str, int | float | bool | str] = Field(
        default_factory=dict, description="further arguments of the objective, as decoder_depth=2 of mae"
    )
    views: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="distinct crops of each image; default: a new one each epoch, or those of --tokens",
    )
    color_jitter: float = Field(0.4, ge=0, le=1, description="colour jitter of the student's view")
    mean: tuple[float, ...] | None = Field(None, description="input mean per channel; default: ImageNet's")
    std: tuple[float, ...] | None = Field(None, description="input deviation per channel; default: ImageNet's")
    eval_data: str | None = Field(
        None,
        min_length=1,
        description="labelled images to measure k-NN and a linear probe on: class folders, or a demo set",
        json_schema_extra=Free,
    )
    eval_every: Count = Field(10, description="epochs between evaluations (and one at the end)", json_schema_extra=Free)

    @field_validator("model_args", "objective_args")
    @classmethod
    def _no_absurd_sizes(cls, arguments: dict[str, int | float | bool | str]) -> dict[str, int | float | bool | str]:
        for name, value in arguments.items():
            if isinstance(value, int) and value > MOST_MODEL_ARGUMENT:
                raise ValueError(f"{name} is {value}; take at most {MOST_MODEL_ARGUMENT}")
        return arguments

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channel(s)")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.init_parts == "all" and self.init is None:
            raise ValueError("init_parts is 'all', but there is no init; name what the run begins with")
        self.check_teacher(self.tokenizer)
        if self.mirror and self.views is None and self.tokens is None:
            raise ValueError("mirror needs views: without a fixed number of views each is drawn anew, flip included")
        return self

    @property
    def input_mean(self) -> tuple[float, ...]:
        """Per-channel mean of the student's input."""
        return self.mean or ((0.485, 0.456, 0.406) if self.channels == 3 else (0.449,))

    @property
    def input_std(self) -> tuple[float, ...]:
        """Per-channel deviation of the student's input."""
        return self.std or ((0.229, 0.224, 0.225) if self.channels == 3 else (0.226,))

    def resolve(self, images: int, processes: int = 1) -> Self:
        """Fill in what has a default depending on other values; see ``TrainKeys.resolve``."""
        return super().resolve(images, processes).model_copy(update={"mean": self.input_mean, "std": self.input_std})
