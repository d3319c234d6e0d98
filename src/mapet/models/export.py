"""Export of a network as a folder that timm loads."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from mapet.config.keys import ordered_range

# timm refuses configurations with unknown keys, so a value range is one of its notes.
RANGE_NOTE = "values from {!r} to {!r} become 0 to 1"
RANGE_PATTERN = re.compile(r"values from (\S+) to (\S+) become 0 to 1")


def export_network(
    network: nn.Module,
    folder: Path,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    classes: Sequence[str] = (),
    license: str = "unknown",
    tag: str | None = None,
    value_range: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``model.safetensors`` and ``config.json`` into an existing folder.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` then gives the identical output, if the weights are
    stored in float32. The layout is that of the Hugging Face hub, to which the folder can be pushed as it is.

    Args:
        network: made by ``timm.create_model``, which has recorded its arguments.
        folder: where to write.
        mean, std: the input normalisation of training.
        crop_pct: share of the resized image's side that the network sees.
        interpolation: of the resizing.
        classes: names of a classifier's outputs.
        license: of these weights, as the hub names it; timm would write the licence of its own weights.
        tag: of these weights, which timm writes after the architecture and a dot; None: the network's own.
        value_range: of images with more than 8 bits: the values that become 0 and 1; None: each image is stretched.
        dtype: of the stored weights.
    """
    save_for_hf(
        network if dtype == torch.float32 else copy.deepcopy(network).to(dtype),
        str(folder),
        model_config={
            "label_names": list(classes),
            "pretrained_cfg": {
                "license": license,
                "notes": [] if value_range is None else [RANGE_NOTE.format(*map(float, value_range))],
                **({"tag": tag} if tag else {}),
            },
        },
        safe_serialization=True,
        data_config={"mean": tuple(mean), "std": tuple(std), "interpolation": interpolation, "crop_pct": crop_pct},
    )


def read_range(network: Any) -> tuple[float, float] | None:
    """Return the value range that ``export_network`` recorded; None if there is none.

    Raises:
        ValueError: if it is damaged.
    """
    notes = network.pretrained_cfg.get("notes") or ()
    found = [match for note in notes if (match := RANGE_PATTERN.fullmatch(str(note)))]
    if not found:
        return None
    low, high = ordered_range(tuple(map(float, found[0].groups())))
    return low, high
