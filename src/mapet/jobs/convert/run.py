"""Published checkpoints of others, turned into folders that timm and every command here load."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from torch import Tensor

from mapet.config.base import make_config
from mapet.engine.files import claimed_folder, replace_folder
from mapet.engine.runfolder import explain_disk_errors
from mapet.errors import MapetError, nearest
from mapet.inference.models import class_names
from mapet.jobs.convert.config import ConvertConfig
from mapet.models.export import export_network
from mapet.models.peers import beit_blueprint, beitv2_blueprint, mae_blueprint, recognise
from mapet.models.published import Blueprint
from mapet.models.tensors import check_fit, read_tensors
from mapet.models.upstream import upstream_blueprint

logger = logging.getLogger(__name__)

# Mask vector and head of a pre-training checkpoint, beside the exported network.
PRETRAINING_FILE = "pretraining.safetensors"


@dataclass(frozen=True)
class Kind:
    """Files of one origin.

    Attributes:
        title: of the method.
        blueprint: says which network tensors are for.
        mean, std: of the published models' input.
        crop_pct: of the published classifiers' evaluation.
    """

    title: str
    blueprint: Callable[[Mapping[str, Tensor], int | None], Blueprint]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


_IMAGENET = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
_INCEPTION = IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
KINDS = {
    "upstream": Kind("MaPeT", upstream_blueprint, *_IMAGENET, 0.9),
    "beit": Kind("BEiT", beit_blueprint, *_INCEPTION, 0.9),
    "beitv2": Kind("BEiT v2", beitv2_blueprint, *_IMAGENET, 0.9),
    "mae": Kind("MAE", mae_blueprint, *_IMAGENET, 0.875),
}


def convert(values: Mapping[str, Any], out: str | Path) -> dict[str, Any]:
    """Convert a published file into an exported folder.

    A pre-training checkpoint of MaPeT's authors also gives ``pretraining.safetensors``: its mask vector and head, for
    ``mapet pretrain --init FOLDER --init-parts all``.

    Args:
        values: configuration by key, see ``ConvertConfig``; ``kind`` and ``file`` are needed.
        out: the folder.

    Returns:
        what came of it: ``architecture``, ``num_heads``, ``num_heads_assumed`` (whether neither the file nor the
        configuration says how many), ``image_size``, ``channels``, ``classes`` (their number), ``parameters``,
        ``pretraining`` (whether mask vector and head were kept), ``left_out`` (tensors with no place in the network)
        and ``others`` (what else is in the file, such as an optimizer).

    Raises:
        MapetError: for a file that cannot be read, is of another kind, does not fit, or is not finite; nothing is
            half-written.
    """
    config = make_config(ConvertConfig, dict(values))
    if not str(out):
        raise MapetError("the name of the output folder is empty; say where with --out FOLDER")
    folder, path = Path(out), Path(config.file)
    with claimed_folder(folder):
        state, others = read_tensors(path)
        _check_kind(state, config)
        blueprint = _blueprint(state, config)
        network = _build(blueprint, config)
        mean, std, crop_pct = _input(blueprint.arguments, config)

        def write(fresh: Path) -> None:
            export_network(network, fresh, mean, std, crop_pct=crop_pct, classes=class_names(network), tag=config.kind)
            if blueprint.pretraining:
                save_file(
                    {name: tensor.float().contiguous() for name, tensor in blueprint.pretraining.items()},
                    fresh / PRETRAINING_FILE,
                )

        with explain_disk_errors(folder):
            replace_folder(folder, write)
    if blueprint.left_out:
        logger.info("%s: no part of the network, left out: %s", path, _grouped(blueprint.left_out))
    if others:
        logger.info("%s: besides the weights, not used: %s", path, _grouped(others))
    told = config.num_heads is not None or any(name.endswith("relative_position_bias_table") for name in state)
    return {
        "architecture": blueprint.architecture,
        "num_heads": network.blocks[0].attn.num_heads,
        "num_heads_assumed": not told,
        "image_size": blueprint.arguments["img_size"],
        "channels": blueprint.arguments["in_chans"],
        "classes": blueprint.arguments["num_classes"],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "pretraining": bool(blueprint.pretraining),
        "left_out": sorted(blueprint.left_out),
        "others": sorted(others),
    }


def _check_kind(state: Mapping[str, Tensor], config: ConvertConfig) -> None:
    """Refuse a file that shows itself to be of another kind; tensors do not tell BEiT's classifiers from BEiT v2's."""
    looks = recognise(state)
    if looks == config.kind or (looks == "beit" and config.kind == "beitv2"):
        return
    hint = "none that can be converted" if looks is None else f"{KINDS[looks].title}'s: use mapet convert {looks}"
    raise MapetError(
        f"checkpoint {config.file} holds no Vision Transformer of {KINDS[config.kind].title}; it is {hint}"
    )


def _blueprint(state: Mapping[str, Tensor], config: ConvertConfig) -> Blueprint:
    try:
        blueprint = KINDS[config.kind].blueprint(state, config.num_heads)
    except MapetError as error:
        raise MapetError(f"checkpoint {config.file} cannot be converted: {error}") from error
    if config.model is None:
        return blueprint
    # A model that is named is taken as it is, but for what a file may well differ in: then it fits or does not.
    kept = ("img_size", "in_chans", "num_classes", "global_pool", "fc_norm", "use_fc_norm")
    arguments = {key: value for key, value in blueprint.arguments.items() if key in kept}
    if config.num_heads is not None:
        arguments["num_heads"] = config.num_heads
    return Blueprint(config.model, arguments, blueprint.weights, blueprint.left_out, blueprint.pretraining)


def _build(blueprint: Blueprint, config: ConvertConfig) -> Any:
    """Return the network with the file's weights."""
    name = blueprint.architecture
    if not timm.is_model(name):
        raise MapetError(f"unknown model {name!r}{nearest(name, timm.list_models()) or '; see timm.list_models()'}")
    try:
        network: Any = timm.create_model(name, **blueprint.arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError, ArithmeticError) as error:
        raise MapetError(f"timm cannot build model {name!r} for checkpoint {config.file}: {error}") from error
    wanted = network.state_dict()
    check_fit(blueprint.weights, wanted, config.file, f"model {name!r}")
    strange = [key for key in blueprint.weights if key not in wanted]
    if strange:
        raise MapetError(
            f"weights {config.file} do not fit model {name!r}: it has no place for {_grouped(strange)}; name the model "
            "they are for with --model, or remove them from the file"
        )
    tensors = {**blueprint.weights, **blueprint.pretraining}
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise MapetError(
            f"the weights in {config.file} contain NaN or infinity (first {broken[0]!r}, {len(broken)} tensors); take "
            "another checkpoint"
        )
    network.load_state_dict(blueprint.weights)
    return network.eval()


def _input(arguments: Mapping[str, Any], config: ConvertConfig) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Return mean, std and crop_pct: as said, or the published models'."""
    kind, channels = KINDS[config.kind], arguments["in_chans"]
    mean, std = config.mean or kind.mean, config.std or kind.std
    for key, given in (("mean", mean), ("std", std)):
        if len(given) != channels:
            raise MapetError(
                f"checkpoint {config.file} takes images of {channels} channel(s), but {key} has {len(given)} values; "
                f"pass --{key}"
            )
    return mean, std, config.crop_pct or (kind.crop_pct if arguments["num_classes"] else 1.0)


def _grouped(names: Iterable[str]) -> str:
    """List names by what stands before their first dot."""
    names = list(names)
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(
        f"{head}.* ({count} entries)" if count > 1 else next(name for name in names if name.split(".")[0] == head)
        for head, count in sorted(counts.items())
    )
