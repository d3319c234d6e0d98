"""Conversion of a checkpoint of MaPeT's authors into a folder that timm and every command load."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mapet.config.base import settle
from mapet.engine.files import claimed_folder, replace_folder
from mapet.errors import MapetError
from mapet.inference.models import class_names
from mapet.jobs.convert.config import ConvertConfig
from mapet.models.export import export_network
from mapet.models.upstream import load_backbone

CLASSIFIER_CROP_PCT = 0.9  # of the authors' evaluation


def convert(values: Mapping[str, Any], out: str | Path) -> dict[str, Any]:
    """Convert the network of a checkpoint of MaPeT's authors into an exported folder.

    Args:
        values: configuration by key, see ``ConvertConfig``; ``file`` is needed.
        out: the folder; must not be there yet, or be empty.

    Returns:
        JSON-able: ``architecture``, ``num_heads``, ``num_heads_assumed`` (whether the configuration left the number
        out), ``image_size``, ``channels``, ``classes`` (their number) and ``parameters``.

    Raises:
        MapetError: if the file cannot be read, does not fit, or holds NaN or infinity; nothing is written then.
    """
    config = settle(ConvertConfig, values)
    if not str(out):
        raise MapetError("the name of the output folder is empty; name the folder with --out FOLDER")
    folder = Path(out)
    with claimed_folder(folder):
        network: Any = load_backbone(config.file, {"num_heads": config.num_heads} if config.num_heads else {})[0]
        channels = network.patch_embed.proj.in_channels
        mean, std = config.mean or IMAGENET_DEFAULT_MEAN, config.std or IMAGENET_DEFAULT_STD
        if not len(mean) == len(std) == channels:
            raise MapetError(
                f"checkpoint {config.file} takes {channels} channel(s); pass as many values to --mean and --std"
            )
        crop_pct = config.crop_pct or (CLASSIFIER_CROP_PCT if network.num_classes else 1.0)
        write = partial(
            export_network, network, mean=mean, std=std, crop_pct=crop_pct, classes=class_names(network), tag="upstream"
        )
        replace_folder(folder, write)
    return {
        "architecture": network.pretrained_cfg["architecture"],
        "num_heads": network.blocks[0].attn.num_heads,
        "num_heads_assumed": config.num_heads is None,
        "image_size": network.patch_embed.img_size[0],
        "channels": channels,
        "classes": network.num_classes,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
