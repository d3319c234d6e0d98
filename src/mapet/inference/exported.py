"""What is in an exported folder, checked: timm takes much as it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from safetensors import safe_open
from torch import nn

from mapet.config.base import StrictConfig, make_config
from mapet.errors import MapetError

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1)]


class _Lenient(StrictConfig):
    """What else timm writes is its own affair; but it converts nothing, so "28" is no number."""

    model_config = ConfigDict(extra="ignore", strict=True)


class ModelArgs(_Lenient):
    """Arguments of the network that its input and output depend on."""

    in_chans: Side | None = None
    num_classes: Count | None = None


class Input(_Lenient):
    """What images are made into."""

    input_size: list[Side] = Field(default=[3, 224, 224], min_length=3, max_length=3)
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "random"] | None = None
    num_classes: Count | None = None


class ExportedConfig(_Lenient):
    """The keys of ``config.json`` that are relied on, as ``timm.models.save_for_hf`` writes them."""

    architecture: str = Field(min_length=1, description="timm's name of the network")
    pretrained_cfg: Input = Input()
    model_args: ModelArgs = ModelArgs()
    num_classes: Count | None = None
    label_names: list[str] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        channels = self.model_args.in_chans or self.pretrained_cfg.input_size[0]
        for key in ("mean", "std"):
            values = getattr(self.pretrained_cfg, key)
            if values is not None and len(values) != channels:
                raise ValueError(f"{key} has {len(values)} values, but images of {channels} channel(s) are read")
        counts = {
            "num_classes": self.num_classes,
            "model_args.num_classes": self.model_args.num_classes,
            "pretrained_cfg.num_classes": self.pretrained_cfg.num_classes,
        }
        said = {key: count for key, count in counts.items() if count is not None}
        if len(set(said.values())) > 1:
            raise ValueError(" but ".join(f"{key} is {count}" for key, count in said.items()))
        if self.label_names is not None:
            if len(set(self.label_names)) < len(self.label_names):
                raise ValueError("label_names names a class twice")
            for key, count in said.items():
                if len(self.label_names) != count:
                    raise ValueError(f"label_names has {len(self.label_names)} names, but {key} is {count}")
        return self


def check_types(folder: Path, network: nn.Module) -> None:
    """Refuse weights that timm converts to the network's floats in silence, though they mean something else.

    Raises:
        MapetError: naming the file and the tensor.
    """
    wanted, path = network.state_dict(), folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            kind = file.get_slice(name).get_dtype()
            if name in wanted and wanted[name].is_floating_point() and kind not in FLOATS:
                raise MapetError(f"{path} holds {name!r} as {kind}, not as one of {', '.join(FLOATS)}; export it again")


def check_exported(folder: Path) -> None:
    """Refuse a ``config.json`` by which no network can be built, or no image be made its input.

    Raises:
        MapetError: naming the file and the key.
    """
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MapetError(f"{file} cannot be read ({error}); export the model again") from error
    if not isinstance(content, dict):
        raise MapetError(f"{file} cannot be read (it is no JSON object); export the model again")
    try:
        make_config(ExportedConfig, content, str(file))
    except MapetError as error:
        raise MapetError(f"{error}; restore it or export the model again") from error
