"""Export of a network as a folder that timm loads by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm.models import save_for_hf
from torch import nn


def export_network(
    network: nn.Module,
    folder: Path,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop_pct: float = 1.0,
    classes: Sequence[str] = (),
) -> None:
    """Write ``model.safetensors`` and ``config.json`` into an existing folder.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` then gives the identical output. The layout
    Hugging Face's hub expects is the same, so the folder can be pushed as it is.

    Args:
        network: made by ``timm.create_model``, whose arguments timm has recorded.
        folder: where.
        mean, std: the input normalisation the network was trained with.
        crop_pct: share of the resized image's side that the network is to see.
        classes: names of a classifier's outputs.
    """
    save_for_hf(
        network,
        str(folder),
        model_config={"label_names": list(classes)} if classes else None,
        # Stochastic depth belongs to the training that is over, not to the model that comes out of it.
        model_args={"drop_path_rate": 0.0},
        safe_serialization=True,
        data_config={"mean": tuple(mean), "std": tuple(std), "interpolation": "bicubic", "crop_pct": crop_pct},
    )
