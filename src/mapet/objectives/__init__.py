"""Pre-training objectives: images and visual token ids in, a loss out."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from mapet.errors import MapetError, nearest
from mapet.objectives.classification import Classification
from mapet.objectives.layout_objective import LayoutObjective, Output
from mapet.objectives.mapet import MaPeT
from mapet.objectives.mim import MIM
from mapet.objectives.pim import PIM
from mapet.objectives.raster import Raster
from mapet.objectives.upstream import load_upstream
from mapet.objectives.vqkd import VQKDObjective

__all__ = [
    "MIM",
    "OBJECTIVES",
    "PIM",
    "Classification",
    "LayoutObjective",
    "MaPeT",
    "Output",
    "Raster",
    "VQKDObjective",
    "build_objective",
    "load_upstream",
]

OBJECTIVES: dict[str, type[LayoutObjective]] = {"mapet": MaPeT, "pim": PIM, "mim": MIM, "raster": Raster}


def build_objective(
    name: str,
    backbone: VisionTransformer,
    vocab_size: int,
    context_tokens: int | None = None,
    order: str | None = None,
) -> LayoutObjective:
    """Build the objective called ``name`` around a backbone; see ``LayoutObjective`` for the arguments."""
    if name not in OBJECTIVES:
        raise MapetError(
            f"unknown objective {name!r}{nearest(name, OBJECTIVES) or f'; choose from {sorted(OBJECTIVES)}'}"
        )
    return OBJECTIVES[name](backbone, vocab_size, context_tokens, order)
