"""Opening a model: a run folder, an exported folder, one of the package's or a timm model by name."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import nn
from torchvision.transforms import InterpolationMode

from mapet.data.decode import check_channels
from mapet.data.views import PlainView
from mapet.engine.checkpoint import read_state
from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError, nearest

check_exported = check_types = lambda *a: None
from mapet.models.released import RELEASED, released_folder
from mapet.tokenizers.base import hash_content

logger = logging.getLogger(__name__)

# What networks raise for images that do not fit.
_SIZE_ERRORS = AssertionError, ValueError, RuntimeError, TypeError, IndexError, ArithmeticError
EXPORT_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class OpenModel:
    """A timm model in evaluation mode, and what its input is to be.

    Attributes:
        name: what the user called it.
        network: timm's; ``forward`` gives logits, or the pooled feature where there is no classifier.
        view: makes its input from a decoded image.
        channels: of its input.
        classes: names of the classifier's outputs, numbers where nothing better is known; () without a classifier.
    """

    name: str
    network: nn.Module
    view: PlainView
    channels: int
    classes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.network.parameters()).device

    @property
    def weights_hash(self) -> str:
        """SHA-256 of its tensors, as they are used: without the classifier, if that was left off."""
        return hash_content({}, self.network)

    def require_classes(self) -> tuple[str, ...]:
        """Return the names of its classes, or refuse a model that has no classifier."""
        if not self.classes:
            raise MapetError(f"model {self.name!r} has no classifier; fine-tune it first with mapet finetune")
        return self.classes


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
    """Open a model with its weights, on the CPU; of a run that has not finished a warning says how far it is.

    Args:
        source: a run folder (its ``exported/`` is taken), an exported folder, the name of one that comes with the
            package (``models.RELEASED``), or a timm model name, perhaps with ``local-dir:`` or ``hf-hub:``.
        classifier: keep its classifier; else the network's output is the pooled feature.
        image_size: rows and columns of its input in pixels; position embeddings are resized. None: as it was trained.
        crop_pct: see ``PlainView``; None: as timm has it.
        reinit: with random weights instead of its own, drawn from ``seed``.
        drop_path: stochastic depth rate of its last block, for training.

    Raises:
        MapetError: if there is no such model, its weights cannot be had or are not finite, or the size does not fit.
    """
    name = _timm_name(released_folder(str(source)))
    folder = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
    if folder:
        check_exported(folder)
    if reinit:
        torch.manual_seed(seed)
    network = _create(name, str(source), pretrained=not reinit, **({"drop_path_rate": drop_path} if drop_path else {}))
    if folder and not reinit:
        check_types(folder, network)
    if not classifier:
        # Not left out from the start: for another number of classes timm passes over weights that are lacking.
        network.reset_classifier(0)
    if image_size is not None:
        _resize(network, image_size, str(source))
    broken = [key for key, value in network.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise MapetError(
            f"the weights of {str(source)!r} contain NaN or infinity (first {broken[0]!r}, {len(broken)} tensors); "
            "take an earlier checkpoint, or train again with a lower --lr"
        )
    config = resolve_data_config(model=network)
    channels = int(config["input_size"][0])
    check_channels(channels)
    size = image_size or _trained_size(network) or tuple(config["input_size"][1:])
    network.eval()
    if image_size is not None or not hasattr(network, "set_input_size"):
        _try_size(network, channels, size, str(source))
    known = {mode.value for mode in InterpolationMode}
    view = PlainView(
        size,
        tuple(config["mean"]),
        tuple(config["std"]),
        config["crop_pct"] if crop_pct is None else crop_pct,
        config["interpolation"] if config["interpolation"] in known else "bicubic",
        config.get("crop_mode") == "squash",
    )
    if not reinit:
        _warn_of_unfinished(RunFolder(Path(str(source).removeprefix("local-dir:"))))
    return OpenModel(str(source), network, view, channels, class_names(network))


def _timm_name(source: str) -> str:
    """Return what timm calls it; a folder must hold a whole export."""
    folder = Path(source.removeprefix("local-dir:"))
    local = source.startswith("local-dir:")
    # os.path, not pathlib: false, not an error, for what no file name can be.
    if not os.path.isdir(folder):  # noqa: PTH112
        if (":" in source and not local) or timm.is_model(source):
            return source
        if os.path.isfile(folder):  # noqa: PTH113
            raise MapetError(
                f"model {source!r} is a file, not a folder; turn a published checkpoint into one with mapet convert, "
                "or name a run, an exported folder or a timm model"
            )
        # A folder is meant where there is a separator, for no timm name has one.
        if local or os.sep in source or os.path.exists(folder):  # noqa: PTH110
            raise MapetError(f"model folder {source!r} does not exist; name a run, an exported folder or a timm model")
        raise MapetError(
            f"unknown model {source!r}: it is neither a run folder, nor an exported folder, nor a timm "
            f"model{nearest(source, [*RELEASED, *timm.list_models()])}"
        )
    exported = RunFolder(folder).exported
    if exported.is_dir():
        folder = exported
    lacking = [name for name in EXPORT_FILES if not (folder / name).is_file()]
    if lacking:
        raise MapetError(
            f"folder {source!r} is neither a run that was saved at least once nor an exported model: {folder} lacks "
            f"{lacking[0]!r}"
        )
    return f"local-dir:{folder}"


def _warn_of_unfinished(run: RunFolder) -> None:
    """Say how far a run is, unless it has finished or nothing tells."""
    if not run.checkpoint.exists():  # no run, or its checkpoint was removed to save space
        return
    try:
        state = read_state(run.checkpoint)
    except MapetError as error:
        logger.warning("nothing tells whether run %s has finished: %s", run.root, error)
        return
    if state.step < state.total_steps:
        logger.warning(
            "run %s has not finished: its weights are those after step %d of %d (%d %%)",
            run.root,
            state.step,
            state.total_steps,
            100 * state.step // state.total_steps,
        )


def _create(name: str, source: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # of the file system, safetensors, the hub's HTTP library, JSON, torch
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "drop_path_rate" in reason:
            raise MapetError(f"model {source!r} has no stochastic depth; pass --drop-path 0") from error
        if name.startswith("local-dir:"):
            raise MapetError(
                f"the model in {name.removeprefix('local-dir:')} cannot be read ({reason}); it may be cut short or "
                "edited, export it again"
            ) from error
        raise MapetError(
            f"the weights of model {source!r} could not be fetched ({reason}); convert a local file with mapet convert"
        ) from error


def _resize(network: nn.Module, size: tuple[int, int], source: str) -> None:
    """Let a network take images of another size; those without position embeddings take any."""
    resize = getattr(network, "set_input_size", None)
    if resize is None:
        return
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    for side, part in zip(size, (patch, patch) if isinstance(patch, int) else patch, strict=True):
        if side % part:
            lower = max(part, side // part * part)
            raise MapetError(
                f"image size {size[0]}x{size[1]} does not fit model {source!r}: {side} is not divisible by its patch "
                f"size {part}; take {lower} or {lower + part}"
            )
    try:
        resize(img_size=size)
    except _SIZE_ERRORS as error:
        raise _wrong_size(source, size, error) from error


@torch.no_grad()
def _try_size(network: nn.Module, channels: int, size: tuple[int, int], source: str) -> None:
    """Refuse a size that a network finds out about only when it runs."""
    try:
        network(torch.zeros(1, channels, *size))
    except _SIZE_ERRORS as error:
        raise _wrong_size(source, size, error) from error


def _wrong_size(source: str, size: tuple[int, int], error: Exception) -> MapetError:
    reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
    return MapetError(
        f"model {source!r} cannot take images of {size[0]} x {size[1]} pixels ({reason}); choose another --image-size, "
        "or leave it out"
    )


def _trained_size(network: nn.Module) -> tuple[int, int] | None:
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def class_names(network: nn.Module) -> tuple[str, ...]:
    """Return what is known of a classifier's outputs: names, or numbers; () if there is no classifier."""
    count = getattr(network, "num_classes", 0)
    if not count:
        return ()
    names = getattr(network, "pretrained_cfg", {}).get("label_names")
    if names is None and (subset := infer_imagenet_subset(network)):
        names = ImageNetInfo(subset).label_names()
    return tuple(map(str, names)) if names is not None and len(names) == count else tuple(map(str, range(count)))
