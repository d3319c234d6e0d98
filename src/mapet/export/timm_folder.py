"""Export of a backbone as a folder that timm loads by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer


def export_backbone(backbone: VisionTransformer, folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write ``model.safetensors`` and ``config.json`` into an existing folder.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` then gives the identical features. The layout
    Hugging Face's hub expects is the same, so the folder can be pushed as it is.

    Args:
        backbone: a timm ViT made by ``timm.create_model``, whose arguments timm has recorded.
        folder: where.
        mean, std: the input normalisation the backbone was trained with.
    """
    save_for_hf(
        backbone,
        str(folder),
        # Stochastic depth belongs to the training that is over, not to the model that comes out of it.
        model_args={"drop_path_rate": 0.0},
        safe_serialization=True,
        data_config={"mean": tuple(mean), "std": tuple(std), "interpolation": "bicubic", "crop_pct": 1.0},
    )
