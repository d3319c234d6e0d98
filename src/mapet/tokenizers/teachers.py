"""Pre-trained networks as teachers: images in, feature maps out."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Self

import timm
import torch
import torchvision
from safetensors import SafetensorError
from timm.models import get_model_args
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mapet.errors import MapetError, nearest
from mapet.models.released import RELEASED, released_folder
from mapet.models.tensors import check_fit, read_tensors
from mapet.tokenizers.base import with_channels
from mapet.tokenizers.weights import fetch_weights

IMAGENET_NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Teacher(nn.Module):
    """A frozen network, cut off after one stage, with its own input normalisation.

    Maps ``(B, 3, H, W)`` or ``(B, 1, H, W)`` images in [0, 1] to a feature map ``(B, d, h, w)``.

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

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.name}, stage {self.stage}, reads {self.channels} channels>"

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Teacher:
        """Build a teacher with random weights."""
        if config["library"] == "torchvision":
            return TorchvisionTeacher(config, torchvision.models.get_model(config["name"], weights=None))
        return TimmTeacher(config, _timm_network(config["architecture"], pretrained=False, **config["model_args"]))

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
        """Return the feature map of images in [0, 1]."""
        return self.stage_output((with_channels(images, self.channels) - self.mean) / self.std)

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
        name: a timm model name, ``local-dir:FOLDER`` (or just the folder) as ``mapet`` and timm export it, the name of
            a backbone that comes with the package, ``hf-hub:ID``, or a torchvision model name.
        stage: for timm the index of a stage or block (default: the last), for torchvision the name of a node
            (default: ``features`` or ``layer4``).
        weights: weights of the whole network: a file, a URL or ``hf-hub:OWNER/REPOSITORY/FILE``; None takes the
            published ones.

    Raises:
        MapetError: for an unknown name or stage, or weights that cannot be read or do not fit.
    """
    library = library_of(name)
    build = _torchvision_teacher if library == "torchvision" else _timm_teacher
    return build(name, stage, weights)


def library_of(name: str) -> str:
    """Return the library of a teacher, ``timm`` or ``torchvision``, from its name alone.

    Raises:
        MapetError: for a name that neither has.
    """
    if _is_export(released_folder(name)) or ":" in name or timm.is_model(name):
        return "timm"
    of_torchvision = torchvision.models.list_models(module=torchvision.models)
    if name in of_torchvision:
        return "torchvision"
    if Path(name).is_dir():
        raise MapetError(
            f"folder {name!r} holds neither a tokenizer nor an exported backbone (config.json); name the exported/ "
            "folder of a run, or that of a fitted tokenizer"
        )
    hint = nearest(name, {"pixels", *RELEASED, *timm.list_models(), *of_torchvision})
    raise MapetError(
        f"unknown tokenizer or teacher {name!r}{hint}; a tokenizer is 'pixels' or the folder of a fitted one, a "
        "teacher is a timm or torchvision model name or the exported/ folder of an earlier run"
    )


def _is_export(name: str) -> bool:
    # os.path.isfile returns False for text that cannot be a file name, where pathlib raises.
    return os.path.isfile(Path(name) / "config.json")  # noqa: PTH113


def _timm_teacher(name: str, stage: str | int | None, weights: str | Path | None) -> Teacher:
    try:
        index = -1 if stage is None else int(stage)
    except ValueError:
        raise MapetError(f"stage {stage!r} of timm teacher {name!r} must be a number, e.g. -1 for the last") from None
    folder = released_folder(name)
    source = f"local-dir:{folder}" if _is_export(folder) else name
    recorded = source if folder == name else name  # the name of a released backbone is valid everywhere
    network = _timm_network(source, pretrained=weights is None)
    # timm's own export records the other arguments too; these two are the same for all teachers.
    arguments = {k: v for k, v in get_model_args(network).items() if k not in ("num_classes", "dynamic_img_size")}
    published = network.pretrained_cfg
    config: dict[str, Any] = {key: list(published[key]) for key in ("mean", "std")}
    config |= {"architecture": published["architecture"], "model_args": arguments}
    config |= {"library": "timm", "name": recorded, "stage": index}
    origin = {"weights": recorded} if weights is None else _load_weights(network, name, weights)
    teacher = TimmTeacher(config, network)
    teacher.origin = origin
    return teacher


def _timm_network(name: str, pretrained: bool, **model_args: Any) -> Any:
    arguments = {**model_args, "pretrained": pretrained, "num_classes": 0}
    try:
        try:
            return timm.create_model(name, **arguments, dynamic_img_size=True)
        except TypeError:  # only ViTs have the argument; with it they read images of any size
            return timm.create_model(name, **arguments)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise _not_loaded(name, error) from error


def _torchvision_teacher(name: str, stage: str | int | None, weights: str | Path | None) -> Teacher:
    try:
        with redirect_stdout(sys.stderr):  # torch announces downloads on standard output
            network = torchvision.models.get_model(name, weights="DEFAULT" if weights is None else None)
    except OSError as error:
        raise _not_loaded(name, error) from error
    if stage is None:
        stage = "features" if hasattr(network, "features") else "layer4"
    origin = {"weights": f"torchvision {name}"} if weights is None else _load_weights(network, name, weights)
    config = {"library": "torchvision", "name": name, "stage": str(stage), **IMAGENET_NORMALISATION}
    teacher = TorchvisionTeacher(config, network)
    teacher.origin = origin
    return teacher


def _not_loaded(name: str, error: Exception) -> MapetError:
    reason = " ".join(str(error).split())[:200]
    return MapetError(
        f"the weights of teacher {name!r} could not be fetched or read ({reason}); name another teacher, or pass a "
        "local file with --teacher-weights"
    )


def _load_weights(network: nn.Module, name: str, weights: str | Path) -> dict[str, str]:
    """Load the weights of the whole network from a file, and return their origin."""
    path, origin = fetch_weights(weights)
    (state, _), wanted = read_tensors(path), network.state_dict()
    check_fit(state, wanted, weights, f"teacher {name!r}")
    network.load_state_dict({key: state[key] for key in wanted})
    return origin
