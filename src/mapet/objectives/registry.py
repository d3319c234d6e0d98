"""Objectives by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from mapet.errors import MapetError, nearest
from mapet.objectives.base import Objective
from mapet.objectives.cae import CAE
from mapet.objectives.mae import MAE
from mapet.objectives.mapet import MaPeT
from mapet.objectives.mim import MIM
from mapet.objectives.pim import PIM
from mapet.objectives.raster import Raster
from mapet.objectives.simmim import SimMIM

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
        raise MapetError(
            f"unknown objective {name!r}{nearest(name, OBJECTIVES) or f'; choose from {sorted(OBJECTIVES)}'}"
        )
    return OBJECTIVES[name]


def build_objective(
    name: str,
    backbone: VisionTransformer,
    vocab_size: int | None = None,
    context_tokens: int | None = None,
    order: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> Objective:
    """Build an objective around a backbone.

    Args:
        name: from ``OBJECTIVES``.
        backbone: see ``Objective``, as for the two after the next.
        vocab_size: number of token ids; objectives that need none take no notice.
        context_tokens: how many tokens are given.
        order: how targets are chosen and visited.
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
    if kind.needs_ids:
        args["vocab_size"] = vocab_size
    return kind(backbone, context_tokens=context_tokens, order=order, **args)
