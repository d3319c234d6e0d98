"""Objectives by name."""

import inspect
from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from mapet.errors import MapetError, nearest
from mapet.objectives.base import Objective
from mapet.objectives.cae import CAE
from mapet.objectives.mae import MAE
from mapet.objectives.mapet import MIM, PIM, MaPeT, Raster
from mapet.objectives.simmim import SimMIM
from mapet.objectives.targets import TARGETS, Target

OBJECTIVES: dict[str, type[Objective]] = {
    "mapet": MaPeT,
    "pim": PIM,
    "mim": MIM,
    "raster": Raster,
    "mae": MAE,
    "simmim": SimMIM,
    "cae": CAE,
}


def find_objective(name: str) -> type[Objective]:
    """Return the objective called ``name``.

    Raises:
        MapetError: if there is none.
    """
    if name not in OBJECTIVES:
        hint = nearest(name, OBJECTIVES) or f"; choose from {sorted(OBJECTIVES)}"
        raise MapetError(f"unknown objective {name!r}{hint}")
    return OBJECTIVES[name]


def build_target(objective: str, targets: str, backbone: VisionTransformer, width: int, distance: str) -> Target:
    """Return what an objective predicts of a patch.

    Args:
        objective: a name from ``OBJECTIVES``.
        targets: a name from ``TARGETS``.
        backbone: gives the size of a patch.
        width: number of token ids, or width of the teacher's features; not used for pixels.
        distance: of features.
    """
    if targets == "pixels":
        return find_objective(objective).pixels(backbone)
    return TARGETS[targets](backbone, width, distance)


def build_objective(
    name: str,
    backbone: VisionTransformer,
    target: Target,
    mask_ratio: float | None = None,
    masking: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> Objective:
    """Build an objective around a backbone.

    Args:
        name: a name from ``OBJECTIVES``.
        backbone, target, mask_ratio, masking: see ``Objective``.
        args: further arguments of that objective by name, such as a decoder's depth.

    Raises:
        MapetError: for an unknown name or argument, or values that cannot work.
    """
    kind, args = find_objective(name), dict(args or {})
    parameters = inspect.signature(kind.__init__).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for key in args:
        if key not in known:
            hint = nearest(key, known) or (f"; it takes {', '.join(known)}" if known else "; it takes none")
            raise MapetError(f"objective {name!r} has no argument {key!r}{hint}")
    return kind(backbone, target, mask_ratio, masking, **args)
