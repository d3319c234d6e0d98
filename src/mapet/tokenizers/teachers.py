"""Pre-trained networks as teachers: images in, a map of features out."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import rgb_to_grayscale

from mapet.errors import MapetError, nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """A network cut off at one stage, with its own input normalisation; frozen.

    Maps ``(B, 3, H, W)`` or ``(B, 1, H, W)`` in [0, 1] to ``(B, d, h, w)``, whether the network reads 3 channels or 1.
    """

    def __init__(self, name: str, stage: str | int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.name, self.stage = name, stage
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    network: Any
    mean: Tensor
    std: Tensor

    def freeze(self) -> None:
        """Switch to evaluation, for good."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation: a teacher's batch statistics must not follow the student's mode."""
        return super().train(False)

    def network_map(self, images: Tensor) -> Tensor:
        """Run the network on normalised images."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map of the stage."""
        wanted = self.mean.shape[1]
        if images.shape[1] != wanted:
            images = rgb_to_grayscale(images, num_output_channels=wanted)
        feature_map = self.network_map((images - self.mean) / self.std)
        if feature_map.ndim != 4:
            raise MapetError(
                f"stage {self.stage!r} of teacher {self.name!r} gives a tensor of shape "
                f"{tuple(feature_map.shape)}, not a spatial map; choose an earlier --teacher-stage"
            )
        return feature_map


class TimmTeacher(Teacher):
    """Any timm model that can return intermediate maps; prefix tokens are dropped."""

    def __init__(self, name: str, stage: int, pretrained: bool) -> None:
        network = _timm_network(name, pretrained)
        if not hasattr(network, "forward_intermediates"):
            raise MapetError(f"teacher {name!r} cannot return a spatial map; choose a convolutional network or a ViT")
        config = network.pretrained_cfg
        super().__init__(name, stage, config["mean"], config["std"])
        try:
            # Later stages are never run: dropping them keeps the saved tokenizer small.
            kept = network.prune_intermediate_layers([stage], prune_norm=True, prune_head=True)
        except (IndexError, AssertionError) as error:
            raise MapetError(f"teacher {name!r} has no stage {stage}; choose another --teacher-stage") from error
        self.network, self.kept = network, kept

    def network_map(self, images: Tensor) -> Tensor:
        """Return the map of the stage."""
        maps = self.network.forward_intermediates(images, indices=self.kept, intermediates_only=True)
        return maps[-1]  # type: ignore[no-any-return]


class TorchvisionTeacher(Teacher):
    """Any torchvision classifier, cut at a named node of its graph."""

    def __init__(self, name: str, stage: str, pretrained: bool) -> None:
        super().__init__(name, stage, IMAGENET_MEAN, IMAGENET_STD)
        try:
            network = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
        except OSError as error:
            raise _no_download(name, error) from error
        try:
            self.network = create_feature_extractor(network, {stage: "map"})
        except ValueError as error:
            nodes = [node for node, _ in network.named_modules() if node]
            raise MapetError(
                f"teacher {name!r} has no stage {stage!r}{nearest(stage, nodes)}; its first ones are {nodes[:4]}"
            ) from error

    def network_map(self, images: Tensor) -> Tensor:
        """Return the output of the named node."""
        return self.network(images)["map"]  # type: ignore[no-any-return]


def build_teacher(
    name: str, stage: str | int | None = None, weights: str | Path | None = None, *, pretrained: bool = True
) -> Teacher:
    """Build a frozen teacher.

    Args:
        name: a timm model name, ``local-dir:FOLDER`` or ``hf-hub:ID``, or a torchvision model name.
        stage: for timm the index of a stage (default: the last), for torchvision the name of a node
            (default: ``features`` or ``layer4``).
        weights: a local file of weights for the whole network; None takes the published ones.
        pretrained: false builds it with random weights, to be loaded from a fitted tokenizer.

    Raises:
        MapetError: for an unknown name or stage, or weights that cannot be had or do not fit.
    """
    fetch = pretrained and weights is None
    if ":" in name or timm.is_model(name):
        index = _stage_index(name, stage)
        factory: Any = lambda: TimmTeacher(name, index, fetch)  # noqa: E731
        whole: Any = lambda: _timm_network(name, False)  # noqa: E731
    elif name in torchvision.models.list_models(module=torchvision.models):
        node = str(stage) if stage is not None else _default_node(name)
        factory = lambda: TorchvisionTeacher(name, node, fetch)  # noqa: E731
        whole = lambda: torchvision.models.get_model(name, weights=None)  # noqa: E731
    else:
        known = [*timm.list_models(), *torchvision.models.list_models(module=torchvision.models)]
        raise MapetError(
            f"unknown tokenizer or teacher {name!r}{nearest(name, ['pixels', *known])}; it takes 'pixels', a timm "
            "or torchvision model name, or the folder of a fitted tokenizer"
        )
    teacher: Teacher = factory()
    if weights is not None:
        _load_weights(teacher, whole(), Path(weights))
    teacher.freeze()
    return teacher


def _timm_network(name: str, pretrained: bool) -> Any:
    try:
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError:  # it lets a ViT read any size; networks that are not ViTs do not know the argument
            return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        if pretrained:
            raise _no_download(name, error) from error
        raise MapetError(f"teacher {name!r} cannot be built: {error}") from error


def _no_download(name: str, error: Exception) -> MapetError:
    reason = str(error).splitlines()[0][:200]
    return MapetError(
        f"the weights of teacher {name!r} could not be fetched ({reason}); "
        "pass a local file with --teacher-weights, or use --tokenizer pixels"
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


def _load_weights(teacher: Teacher, whole: nn.Module, path: Path) -> None:
    """Load a file for the whole network strictly, then copy what the cut network needs."""
    state = _read_weights(path)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    wanted = whole.state_dict()
    missing = [name for name in wanted if name not in state]
    wrong = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or wrong:
        what = f"{missing[0]!r} is missing" if missing else f"{wrong[0]!r} has another shape"
        raise MapetError(
            f"weights {path} do not fit teacher {teacher.name!r}: {what} "
            f"({len(missing)} missing, {len(wrong)} of wrong shape of {len(wanted)})"
        )
    teacher.network.load_state_dict({name: state[name] for name in teacher.network.state_dict()})


def _read_weights(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MapetError(f"teacher weights {path} do not exist or are no file; pass the path of a weights file")
    try:
        return dict(timm.models.load_state_dict(str(path), use_ema=False, weights_only=True))
    except (OSError, RuntimeError, ValueError, EOFError, TypeError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise MapetError(f"teacher weights {path} cannot be read as tensors ({reason})") from error
