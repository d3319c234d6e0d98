"""Trained models, opened with the view that makes their input."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import nn
from torchvision.transforms import InterpolationMode

from mapet.config.keys import InferenceKeys
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.engine.checkpoint import read_state
from mapet.engine.parallel import check_precision, one_device
from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError, nearest, reason_of
from mapet.models.export import read_range
from mapet.models.networks import RELEASED, create_network, find_network
from mapet.tokenizers.base import hash_content

logger = logging.getLogger(__name__)

INTERPOLATIONS = frozenset(mode.value for mode in InterpolationMode)


@dataclass(frozen=True, repr=False)
class OpenModel:
    """A timm network in evaluation mode, and what its input must be.

    Attributes:
        name: as the user wrote it.
        network: timm's; ``forward`` returns logits, or the pooled feature of a network without a classifier.
        view: makes its input from a decoded image.
        reading: what images are read as.
        classes: names of the classifier's outputs, or their numbers if no names are known; () without a classifier.
    """

    name: str
    network: nn.Module
    view: PlainView
    reading: Reading
    classes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.network.parameters()).device

    @property
    def weights_hash(self) -> str:
        """SHA-256 of its tensors; without the classifier if it was opened without."""
        return hash_content({}, self.network)

    def require_classes(self) -> tuple[str, ...]:
        """Return the names of its classes.

        Raises:
            MapetError: if it has no classifier.
        """
        if not self.classes:
            raise MapetError(f"model {self.name!r} has no classifier; fine-tune it first with mapet finetune")
        return self.classes


def open_on_device(config: InferenceKeys, *, classifier: bool) -> OpenModel:
    """Open the model of a configuration and move it to the device, see ``open_model`` and ``one_device``."""
    device = one_device()
    check_precision(config.precision)
    options = {key: getattr(config, key) for key in ("image_size", "crop_pct", "reinit", "seed")}
    opened = open_model(config.model, classifier=classifier, **options)
    opened.network.to(device)
    return replace(opened, reading=opened.reading.within(config))


def open_model(
    source: str | Path,
    *,
    classifier: bool = False,
    image_size: tuple[int, int] | None = None,
    crop_pct: float | None = None,
    reinit: bool = False,
    seed: int = 0,
    drop_path: float = 0.0,
) -> OpenModel:
    """Open a model with its weights, on the CPU. A warning says how far an unfinished run has come.

    Args:
        source: see ``find_network``.
        classifier: keep its classifier; else the network returns the pooled feature.
        image_size: rows and columns of its input in pixels; position embeddings are resized. None: as in training.
        crop_pct: see ``PlainView``; None: as timm has it.
        reinit: use random weights, drawn from ``seed``, instead of its own.
        drop_path: stochastic depth rate of its last block, for training.

    Raises:
        MapetError: if there is no such model, its files are damaged, its weights cannot be fetched or are not finite,
            or the size does not fit.
    """
    source = str(source)
    if reinit:
        torch.manual_seed(seed)
    found = find_network(source)
    if found is None:
        raise _not_found(source)
    arguments: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    network = create_network(found, pretrained=not reinit, **arguments)
    if not classifier:
        # Not with num_classes=0 in create_network: timm would then accept weights that lack tensors.
        network.reset_classifier(0)
    network.eval()
    try:
        view, reading = _read_input(network, image_size, crop_pct)
    except (TypeError, ValueError, LookupError) as error:
        raise MapetError(
            f"config.json of model {source!r} is damaged ({error}); restore it or export the model again"
        ) from error
    if image_size is not None or not hasattr(network, "set_input_size"):
        _fit_size(network, reading.channels, view.size, source)
    broken = [key for key, value in network.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise MapetError(
            f"the weights of {source!r} contain NaN or infinity (first {broken[0]!r}, {len(broken)} tensors); "
            "take an earlier checkpoint, or train again with a lower --lr"
        )
    if not reinit:
        _warn_if_unfinished(RunFolder(source.removeprefix("local-dir:")))
    return OpenModel(source, network, view, reading, class_names(network))


def _not_found(source: str) -> MapetError:
    """Return the error for a name that ``find_network`` does not know."""
    path = source.removeprefix("local-dir:")
    # os.path, not pathlib: os.path returns False for text that cannot be a file name, where pathlib raises.
    if os.path.isdir(path):  # noqa: PTH112
        return MapetError(
            f"folder {source!r} is neither a run that was saved at least once nor an exported model (config.json and "
            "model.safetensors)"
        )
    if os.path.isfile(path):  # noqa: PTH113
        return MapetError(
            f"model {source!r} is a file, not a folder; convert a checkpoint of MaPeT's authors with mapet convert, or "
            "name a run, an exported folder or a timm model"
        )
    if path != source or os.sep in source:  # no name of timm has a separator
        return MapetError(f"model folder {source!r} does not exist; name a run, an exported folder or a timm model")
    return MapetError(
        f"unknown model {source!r}: it is neither a run folder, nor an exported folder, nor a timm "
        f"model{nearest(source, [*RELEASED, *timm.list_models()])}"
    )


def _read_input(network: Any, image_size: tuple[int, int] | None, crop_pct: float | None) -> tuple[PlainView, Reading]:
    """Return the view that makes a network's input, and what images are read as.

    Raises:
        ValueError: or TypeError or LookupError, if the network's configuration is damaged.
    """
    config = resolve_data_config(model=network)
    channels, rows, columns = config["input_size"]
    mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
    crop_pct = config["crop_pct"] if crop_pct is None else crop_pct
    if not (len(mean) == len(std) == channels and min(std) > 0 and 0 < crop_pct <= 1):
        raise ValueError(f"mean {mean}, std {std} and crop_pct {crop_pct} do not fit {channels} channel(s)")
    trained_size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    rows, columns = image_size or trained_size or (rows, columns)
    interpolation = config["interpolation"] if config["interpolation"] in INTERPOLATIONS else "bicubic"
    view = PlainView((rows, columns), mean, std, crop_pct, interpolation, config.get("crop_mode") == "squash")
    return view, Reading(channels, read_range(network))


@torch.no_grad()
def _fit_size(network: Any, channels: int, size: tuple[int, int], source: str) -> None:
    """Resize a network's position embeddings, if it has any, and run it once: some refuse a size only then."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    for side, part in zip(size, (patch, patch) if isinstance(patch, int) else patch, strict=True):
        if side % part and hasattr(network, "set_input_size"):
            lower = max(part, side // part * part)
            raise MapetError(
                f"image size {size[0]}x{size[1]} does not fit model {source!r}: {side} is not divisible by its patch "
                f"size {part}; take {lower} or {lower + part}"
            )
    try:
        if hasattr(network, "set_input_size"):
            network.set_input_size(img_size=size)
        network(torch.zeros(1, channels, *size))
    except Exception as error:  # networks raise errors of many types
        raise MapetError(
            f"model {source!r} cannot take images of {size[0]} x {size[1]} pixels "
            f"({reason_of(error, most=200).rstrip('.')}); choose another --image-size, or leave it out"
        ) from error


def _warn_if_unfinished(run: RunFolder) -> None:
    if not run.checkpoint.exists():  # not a run, or its checkpoint was removed to save space
        return
    try:
        state = read_state(run.checkpoint)
    except MapetError as error:
        logger.warning("cannot tell whether run %s has finished: %s", run.root, error)
        return
    if state.step < state.total_steps:
        percent = 100 * state.step // state.total_steps
        logger.warning(
            f"run {run.root} has not finished: its weights are those after step {state.step} of {state.total_steps} "
            f"({percent} %)"
        )


def class_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of a classifier's outputs, or their numbers if none are known; () without a classifier."""
    count = getattr(network, "num_classes", 0)
    if not count:
        return ()
    names = getattr(network, "pretrained_cfg", {}).get("label_names")
    if names is None and (subset := infer_imagenet_subset(network)):
        names = ImageNetInfo(subset).label_names()
    return tuple(map(str, names)) if names is not None and len(names) == count else tuple(map(str, range(count)))
