"""``mapet.load_upstream``: the authors' checkpoints as an objective or a classifier."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mapet.models.upstream import load_backbone, load_weights
from mapet.objectives.mapet import MaPeT
from mapet.objectives.targets import Ids


def load_upstream(
    path_or_state_dict: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> MaPeT | VisionTransformer:
    """Load a checkpoint of MaPeT's authors (arXiv:2306.07346).

    Args:
        path_or_state_dict: one of their files (``.tar`` with ``state_dict``; names may begin with ``module.``) or a
            state dict with separate ``q`` and ``kv`` projections.
        config: what the tensors do not tell, where it differs from the published models: ``num_heads`` (default: 64
            channels a head), ``context_tokens``, ``norm_eps``, and other arguments of ``timm.create_model``.

    Returns:
        The ``MaPeT`` objective of a pre-training checkpoint, whose ``backbone`` is the timm network; the timm
        classifier of a fine-tuned one.

    Raises:
        MapetError: if the file cannot be read, or its tensors do not fit the architecture.
    """
    arguments = dict(config or {})
    context_tokens = arguments.pop("context_tokens", None)
    if "norm_eps" in arguments:
        arguments["norm_layer"] = partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
    network, parts = load_backbone(path_or_state_dict, arguments)
    if not parts:
        return network
    patches = network.patch_embed.num_patches
    mask_ratio = None if context_tokens is None else 1 - (context_tokens - 1) / patches
    objective = MaPeT(network, Ids(parts["head.bias"].numel()), mask_ratio)
    load_weights(objective, objective.state_dict() | parts, "the mask vector or head of the upstream checkpoint")
    return objective
