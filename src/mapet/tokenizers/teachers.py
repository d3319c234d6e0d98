"""Pre-trained networks as teachers: images in, a map of features out."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, Self

import timm
import torch
import torchvision
from timm.models import get_model_args
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from mapet.errors import MapetError, nearest
from mapet.models.released import RELEASED, released_folder
from mapet.models.tensors import check_fit, read_tensors
from mapet.tokenizers.base import with_channels
from mapet.tokenizers.weights import fetch_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """A network cut off at one stage, with its own input normalisation; frozen.

    Maps ``(B, 3, H, W)`` or ``(B, 1, H, W)`` in [0, 1] to ``(B, d, h, w)``, whether the network reads 3 channels or 1.

    Attributes:
        config: what ``from_config`` needs to build the same architecture, JSON-able; the weights' source is not
            needed again.
        origin: where the weights came from, and the SHA-256 of their file where there is one.
    """

    library: ClassVar[str]
    network: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, stage: str | int, mean: Sequence[float], std: Sequence[float], **architecture: Any
    ) -> None:
        super().__init__()
        self.name, self.stage = name, stage
        self.config: dict[str, Any] = {
            "library": self.library,
            "name": name,
            "stage": stage,
            "mean": list(mean),
            "std": list(std),
            **architecture,
        }
        self.origin: dict[str, str] = {}
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Teacher:
        """Build the architecture with random weights, frozen."""
        arguments = dict(config)
        return LIBRARIES[arguments.pop("library")](**arguments).frozen()

    @property
    def channels(self) -> int:
        """How many channels the network reads."""
        return self.mean.shape[1]

    def frozen(self) -> Self:
        """Switch to evaluation, for good."""
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation: a teacher's batch statistics must not follow the student's mode."""
        return super().train(False)

    def network_map(self, images: Tensor) -> Tensor:
        """Run the network on normalised images."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map of the stage."""
        feature_map = self.network_map((with_channels(images, self.channels) - self.mean) / self.std)
        if feature_map.ndim != 4:
            raise MapetError(
                f"stage {self.stage!r} of teacher {self.name!r} gives a tensor of shape "
                f"{tuple(feature_map.shape)}, not a spatial map; choose an earlier --teacher-stage"
            )
        return feature_map

    @torch.no_grad()
    def width(self, size: int) -> int:
        """Return ``d``, found by a blank image of ``size`` pixels square.

        Raises:
            MapetError: if there is no map, it is not finite, or such images cannot be read.
        """
        try:
            feature_map = self(torch.zeros(1, self.channels, size, size, device=self.mean.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise MapetError(
                f"teacher {self.name!r} cannot read images of {size} x {size} pixels "
                f"({' '.join(str(error).split())}); choose another --teacher-size"
            ) from error
        if not bool(feature_map.isfinite().all()):
            raise MapetError(f"the features of teacher {self.name!r} contain NaN or infinity; check its weights")
        return int(feature_map.shape[1])


class TimmTeacher(Teacher):
    """Any timm model that can return intermediate maps; prefix tokens are dropped."""

    library = "timm"

    def __init__(
        self,
        name: str,
        stage: int,
        mean: Sequence[float],
        std: Sequence[float],
        architecture: str,
        model_args: Mapping[str, Any],
        network: nn.Module | None = None,
    ) -> None:
        super().__init__(name, stage, mean, std, architecture=architecture, model_args=dict(model_args))
        self.network = network if network is not None else _timm_network(architecture, False, **model_args)
        if not hasattr(self.network, "forward_intermediates"):
            raise MapetError(f"teacher {name!r} cannot return a spatial map; choose a convolutional network or a ViT")
        try:
            # Later stages are never run: dropping them keeps the saved tokenizer small.
            self.kept = self.network.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)
        except (IndexError, AssertionError) as error:
            raise MapetError(f"teacher {name!r} has no stage {stage}; choose another --teacher-stage") from error

    def network_map(self, images: Tensor) -> Tensor:
        """Return the map of the stage."""
        maps = self.network.forward_intermediates(images, indices=self.kept, intermediates_only=True)
        return maps[-1]  # type: ignore[no-any-return]


class TorchvisionTeacher(Teacher):
    """Any torchvision classifier, cut at a named node of its graph."""

    library = "torchvision"

    def __init__(
        self, name: str, stage: str, mean: Sequence[float], std: Sequence[float], network: nn.Module | None = None
    ) -> None:
        super().__init__(name, stage, mean, std)
        network = network if network is not None else torchvision.models.get_model(name, weights=None)
        inputs = get_graph_node_names(network)[1][0]
        try:
            if stage in ("", inputs):
                raise ValueError(f"{stage!r} is the input")
            self.network = create_feature_extractor(network, {stage: "map"})
        except ValueError as error:
            nodes = [node for node, _ in network.named_modules() if node]
            raise MapetError(
                f"teacher {name!r} has no stage {stage!r}{nearest(stage, nodes)}; its first ones are {nodes[:4]}"
            ) from error

    def network_map(self, images: Tensor) -> Tensor:
        """Return the output of the named node."""
        return self.network(images)["map"]  # type: ignore[no-any-return]


LIBRARIES: dict[str, type[Teacher]] = {"timm": TimmTeacher, "torchvision": TorchvisionTeacher}


def build_teacher(name: str, stage: str | int | None = None, weights: str | Path | None = None) -> Teacher:
    """Build a frozen pre-trained teacher.

    Args:
        name: a timm model name, ``local-dir:FOLDER`` (or just the folder) as ``mapet`` and timm export it, the name of
            one that comes with the package, ``hf-hub:ID``, or a torchvision model name.
        stage: for timm the index of a stage or block (default: the last), for torchvision the name of a node
            (default: ``features`` or ``layer4``).
        weights: of the whole network: a file, a URL or ``hf-hub:ID/FILE``; None takes the published ones.

    Raises:
        MapetError: for an unknown name or stage, or weights that cannot be had or do not fit.
    """
    if library_of(name) == TorchvisionTeacher.library:
        node = str(stage) if stage is not None else _default_node(name)
        return _torchvision_teacher(name, node, weights).frozen()
    source = released_folder(name)
    is_released = source != name
    if _is_export(source):
        source = f"local-dir:{source}"
    if not is_released:
        name = source
    return _timm_teacher(name, source, _stage_index(name, stage), weights).frozen()


def library_of(name: str) -> str:
    """Return which library a teacher's name is of; nothing is built or downloaded.

    Raises:
        MapetError: for a name that is of none.
    """
    if _is_export(released_folder(name)) or ":" in name or timm.is_model(name):
        return TimmTeacher.library
    if name in torchvision.models.list_models(module=torchvision.models):
        return TorchvisionTeacher.library
    if Path(name).is_dir():
        raise MapetError(
            f"folder {name!r} holds neither a tokenizer nor an exported backbone (config.json); name the exported/ "
            "folder of a run, or that of a fitted tokenizer"
        )
    known = [*RELEASED, *timm.list_models(), *torchvision.models.list_models(module=torchvision.models)]
    hint = nearest(name, {"pixels", *known} - {name})
    raise MapetError(
        f"unknown tokenizer or teacher {name!r}{hint}; a tokenizer is 'pixels' or the folder of a fitted one, a "
        "teacher is a timm or torchvision model name or the exported/ folder of an earlier run"
    )


def _is_export(name: str) -> bool:
    return os.path.isfile(Path(name) / "config.json")  # noqa: PTH113 (false, not an error, for what is no file name)


def _timm_teacher(name: str, source: str, stage: int, weights: str | Path | None) -> Teacher:
    network = _timm_network(source, weights is None)
    origin = {"weights": name}
    if weights is not None:
        origin = _load_weights(network, name, weights)
    # As timm's own export records them, but for those that are always the same here.
    architecture = network.pretrained_cfg["architecture"]
    model_args = {k: v for k, v in get_model_args(network).items() if k not in ("num_classes", "dynamic_img_size")}
    config = network.pretrained_cfg
    teacher = TimmTeacher(name, stage, config["mean"], config["std"], architecture, model_args, network)
    teacher.origin = origin
    return teacher


def _torchvision_teacher(name: str, node: str, weights: str | Path | None) -> Teacher:
    try:
        with redirect_stdout(sys.stderr):  # where torch announces a download
            network = torchvision.models.get_model(name, weights="DEFAULT" if weights is None else None)
    except OSError as error:
        raise _no_download(name, error) from error
    origin = _load_weights(network, name, weights) if weights is not None else {"weights": f"torchvision {name}"}
    teacher = TorchvisionTeacher(name, node, IMAGENET_MEAN, IMAGENET_STD, network)
    teacher.origin = origin
    return teacher


def _timm_network(name: str, pretrained: bool, **model_args: Any) -> Any:
    arguments = {**model_args, "num_classes": 0}
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, **arguments, dynamic_img_size=True)
        except TypeError:  # it lets a ViT read any size; networks that are not ViTs do not know the argument
            return timm.create_model(name, pretrained=pretrained, **arguments)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if name.startswith("local-dir:"):
            raise MapetError(
                f"{name.removeprefix('local-dir:')} cannot be read as a backbone exported for timm "
                f"({' '.join(str(error).split())[:200]}); name the exported/ folder of a run"
            ) from error
        if pretrained:
            raise _no_download(name, error) from error
        raise MapetError(f"teacher {name!r} cannot be built: {error}") from error


def _no_download(name: str, error: Exception) -> MapetError:
    reason = str(error).splitlines()[0][:200]
    return MapetError(
        f"the weights of teacher {name!r} could not be fetched ({reason}); "
        "pass a local file with --teacher-weights, or take pixels"
    )


def _stage_index(name: str, stage: str | int | None) -> int:
    if stage is None:
        return -1
    try:
        return int(stage)
    except ValueError:
        raise MapetError(f"stage {stage!r} of timm teacher {name!r} must be a number, e.g. -1 for the last") from None


def _default_node(name: str) -> str:
    children = dict(torchvision.models.get_model(name, weights=None).named_children())
    for node in ("features", "layer4"):
        if node in children:
            return node
    raise MapetError(f"say with --teacher-stage where to cut teacher {name!r}; its parts are {list(children)}")


def _load_weights(network: nn.Module, name: str, weights: str | Path) -> dict[str, str]:
    """Load a file for the whole network; return its origin."""
    path, origin = fetch_weights(weights)
    (state, _), wanted = read_tensors(path), network.state_dict()
    check_fit(state, wanted, weights, f"teacher {name!r}")
    network.load_state_dict({key: state[key] for key in wanted})
    return origin
