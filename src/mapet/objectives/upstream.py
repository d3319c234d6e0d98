"""Loading the authors' checkpoints as an objective or as a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.errors import MapetError
from mapet.models.upstream import PRETRAINING_NAMES, read_upstream, vit_from_upstream
from mapet.objectives.mapet import MaPeT
from mapet.objectives.targets import Ids


def load_upstream(
    path_or_state_dict: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> MaPeT | VisionTransformer:
    """Read a checkpoint of MaPeT's authors.

    Args:
        path_or_state_dict: one of their files (``.tar`` with ``state_dict``, keys perhaps prefixed
            ``module.``) or a state dict with separate ``q`` and ``kv`` projections.
        config: what the tensors do not tell, if it differs from the published models: ``num_heads``
            (default: 64 channels a head), ``context_tokens``, ``norm_eps``, ...

    Returns:
        For a pre-training checkpoint a ``MaPeT`` objective, whose ``backbone`` is the timm model; for a
        fine-tuned one the timm classifier.

    Raises:
        MapetError: if it cannot be read, or its tensors do not fit the architecture.
    """
    state = read_upstream(path_or_state_dict)
    config = dict(config or {})
    if "decoder.weight" not in state:
        classifier = vit_from_upstream(state, config)
        _load(classifier, state)
        return classifier
    renamed = {PRETRAINING_NAMES.get(name, f"backbone.{name}"): tensor for name, tensor in state.items()}
    objective = MaPeT(
        vit_from_upstream(state, config),
        Ids(state["decoder.weight"].shape[0]),
    )
    _load(objective, renamed)
    return objective


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise MapetError(f"the upstream checkpoint does not fit its architecture: {reason}") from error
