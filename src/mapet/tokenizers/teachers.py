"""Pre-trained networks as teachers: images in, feature maps out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models import get_model_args
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mapet.errors import MapetError, nearest
from mapet.models.networks import RELEASED, create_network, find_network, unfetched
from mapet.models.tensors import check_fit, fetch_tensors
from mapet.tokenizers.base import Grid, check_convertible, full_precision, resized, with_channels

IMAGENET_NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Teacher(nn.Module):
    """A frozen network, cut off after one stage, with its own input normalisation.

    Maps ``(B, C, H, W)`` images in [0, 1] to a feature map ``(B, d, h, w)``; grey and RGB are converted.

    Args:
        config: library, name and stage, input normalisation and architecture; can be written as JSON.
        network: the whole network.

    Attributes:
        channels: channels that the network reads.
        origin: source of the weights, and the SHA-256 of their file if there is one.

    Raises:
        MapetError: if the network has no such stage.
    """

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, config: Mapping[str, Any], network: nn.Module) -> None:
        super().__init__()
        self.config, self.name, self.stage = dict(config), config["name"], config["stage"]
        self.channels = len(config["mean"])
        self.origin: dict[str, str] = {}
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(1, -1, 1, 1), persistent=False)
        self.network = self.cut(network)
        self.requires_grad_(False).eval()

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Teacher:
        """Build a teacher with random weights."""
        if config["library"] == "torchvision":
            return TorchvisionTeacher(config, torchvision.models.get_model(config["name"], weights=None))
        name, arguments = config["architecture"], config["model_args"]
        return TimmTeacher(config, create_network(name, pretrained=False, any_size=True, num_classes=0, **arguments))

    def cut(self, network: Any) -> nn.Module:
        """Return the network without the parts after the stage."""
        raise NotImplementedError

    def stage_output(self, images: Tensor) -> Tensor:
        """Return the output of the stage for normalised images."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: a teacher's batch statistics must not follow the student's mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map of images in [0, 1], computed in float32 or, on NVIDIA GPUs, in TF32."""
        with full_precision(images.device, tf32=True):
            return self.stage_output((with_channels(images, self.channels) - self.mean) / self.std)

    def on_grid(self, images: Tensor, size: int, grid: Grid) -> Tensor:
        """Return the features ``(B, P, d)`` of images resized to ``size``; the feature map is resized to ``grid``."""
        feature_map: Tensor = self(resized(images, size))
        if feature_map.shape[-2:] != grid:
            feature_map = F.interpolate(feature_map, grid, mode="bilinear", antialias=True)
        return feature_map.flatten(2).transpose(1, 2).contiguous()

    def check_channels(self, channels: int) -> None:
        """Refuse images of channels that cannot be converted to the teacher's.

        Raises:
            MapetError: naming the teacher.
        """
        try:
            check_convertible(channels, self.channels)
        except MapetError as error:
            raise MapetError(f"teacher {self.name!r} does not fit: {error}; choose another teacher") from error

    @torch.no_grad()
    def width(self, size: int) -> int:
        """Return ``d``, measured on a blank image of ``size`` x ``size`` pixels.

        Raises:
            MapetError: if the network cannot read such images, or its output is not a finite feature map.
        """
        try:
            features = self(torch.zeros(1, self.channels, size, size, device=self.mean.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise MapetError(
                f"teacher {self.name!r} cannot read images of {size} x {size} pixels "
                f"({' '.join(str(error).split())}); choose another --teacher-size"
            ) from error
        if features.ndim != 4:
            raise MapetError(
                f"stage {self.stage!r} of teacher {self.name!r} gives a tensor of shape {tuple(features.shape)}, not a "
                "spatial map; choose an earlier --teacher-stage"
            )
        if not bool(features.isfinite().all()):
            raise MapetError(f"the features of teacher {self.name!r} contain NaN or infinity; check its weights")
        return int(features.shape[1])


class TimmTeacher(Teacher):
    """A timm model that returns intermediate feature maps; prefix tokens are dropped."""

    def cut(self, network: Any) -> nn.Module:
        """Drop the later stages, which keeps saved tokenizers small."""
        try:
            self.kept = network.prune_intermediate_layers([int(self.stage)], prune_norm=True, prune_head=True)
        except (AttributeError, IndexError, AssertionError) as error:
            raise MapetError(
                f"teacher {self.name!r} has no stage {self.stage}, or returns no feature maps; choose another"
            ) from error
        return network  # type: ignore[no-any-return]

    def stage_output(self, images: Tensor) -> Tensor:
        """Return the feature map of the stage."""
        return self.network.forward_intermediates(images, indices=self.kept, intermediates_only=True)[-1]  # type: ignore[no-any-return]


class TorchvisionTeacher(Teacher):
    """A torchvision classifier, cut at a named node of its graph."""

    def cut(self, network: Any) -> nn.Module:
        """Return the graph up to the node."""
        try:
            return create_feature_extractor(network, {self.stage: "map"})  # type: ignore[no-any-return]
        except ValueError as error:
            nodes = [node for node, _ in network.named_modules() if node]
            raise MapetError(
                f"teacher {self.name!r} has no stage {self.stage!r}{nearest(self.stage, nodes)}; its first stages are "
                f"{nodes[:4]}"
            ) from error

    def stage_output(self, images: Tensor) -> Tensor:
        """Return the output of the node."""
        return self.network(images)["map"]  # type: ignore[no-any-return]


def build_teacher(name: str, stage: str | int | None = None, weights: str | Path | None = None) -> Teacher:
    """Build a frozen pre-trained teacher.

    Args:
        name: a run folder, an exported folder, the name of a backbone that comes with the package, a timm model name
            (see ``find_network``), or a torchvision model name.
        stage: for timm the index of a stage or block (default: the last), for torchvision the name of a node
            (default: ``features`` or ``layer4``).
        weights: weights of the whole network: a file, a URL or ``hf-hub:OWNER/REPOSITORY/FILE``; None takes the
            published ones.

    Raises:
        MapetError: for an unknown name or stage, or weights that cannot be read or do not fit.
    """
    is_timm = library_of(name) == "timm"
    open_network = _open_timm if is_timm else _open_torchvision
    config, network = open_network(name, stage, pretrained=weights is None)
    origin = {"weights": config["name"] if is_timm else f"torchvision {name}"}
    if weights is not None:
        (state, origin), wanted = fetch_tensors(weights), network.state_dict()
        check_fit(state, wanted, weights, f"teacher {name!r}")
        network.load_state_dict({key: state[key] for key in wanted})
    teacher = TimmTeacher(config, network) if is_timm else TorchvisionTeacher(config, network)
    teacher.origin = origin
    return teacher


def library_of(name: str) -> str:
    """Return the library of a teacher, ``timm`` or ``torchvision``, from its name alone.

    Raises:
        MapetError: for a name that neither has.
    """
    if find_network(name) is not None:
        return "timm"
    of_torchvision = torchvision.models.list_models(module=torchvision.models)
    if name in of_torchvision:
        return "torchvision"
    if Path(name).is_dir():
        raise MapetError(
            f"folder {name!r} holds neither a tokenizer nor an exported backbone (config.json and model.safetensors); "
            "name a run that was saved at least once, its exported/ folder, or the folder of a fitted tokenizer"
        )
    hint = nearest(name, {"pixels", *RELEASED, *timm.list_models(), *of_torchvision})
    raise MapetError(
        f"unknown tokenizer or teacher {name!r}{hint}; a tokenizer is 'pixels' or the folder of a fitted one, a "
        "teacher is a timm or torchvision model name or the folder of an earlier run"
    )


def _open_timm(name: str, stage: str | int | None, pretrained: bool) -> tuple[dict[str, Any], nn.Module]:
    """Return the configuration of a timm teacher, and the whole network without its classifier."""
    try:
        index = -1 if stage is None else int(stage)
    except ValueError:
        raise MapetError(f"stage {stage!r} of timm teacher {name!r} must be a number, e.g. -1 for the last") from None
    found = str(find_network(name))
    network = create_network(found, pretrained=pretrained, any_size=True, num_classes=0)
    # timm's own export records the other arguments too; these two are the same for all teachers.
    arguments = {k: v for k, v in get_model_args(network).items() if k not in ("num_classes", "dynamic_img_size")}
    published = network.pretrained_cfg
    is_released = found == f"local-dir:{RELEASED.get(name)}"  # its name is valid on all machines
    config: dict[str, Any] = {key: list(published.get(key) or ()) for key in ("mean", "std")}
    if not all(isinstance(value, int | float) for values in config.values() for value in values) or not (
        len(config["mean"]) == len(config["std"]) > 0
    ):
        raise MapetError(
            f"config.json of teacher {name!r} is damaged (mean {config['mean']}, std {config['std']}); restore it or "
            "export the model again"
        )
    config |= {"architecture": published["architecture"], "model_args": arguments}
    config |= {"library": "timm", "name": name if is_released else found, "stage": index}
    return config, network


def _open_torchvision(name: str, stage: str | int | None, pretrained: bool) -> tuple[dict[str, Any], nn.Module]:
    """Return the configuration of a torchvision teacher, and the whole network."""
    try:
        with redirect_stdout(sys.stderr):  # torch announces downloads on standard output
            network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    except OSError as error:
        raise unfetched(name, error) from error
    if stage is None:
        stage = "features" if hasattr(network, "features") else "layer4"
    return {"library": "torchvision", "name": name, "stage": str(stage), **IMAGENET_NORMALISATION}, network
