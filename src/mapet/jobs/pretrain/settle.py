"""A pre-training configuration, settled once from what was asked, the data and the network."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from mapet.config.base import default_of, parse, settle
from mapet.data.seeds import Stream, fold_seed
from mapet.engine.parallel import check_precision, fast_precision
from mapet.jobs.pretrain.config import PretrainConfig, check_targets
from mapet.jobs.pretrain.start import inherit
from mapet.models.networks import build_vit
from mapet.objectives.base import Objective
from mapet.objectives.registry import build_objective, find_objective
from mapet.objectives.targets import Ids
from mapet.targets.sources import settle_view
from mapet.targets.tokenizer import check_fittable, check_grid, is_ready, settle_vocab_size
from mapet.tokenstore.store import TokenStore


def settle_run(asked: Mapping[str, Any], images: int, processes: int = 1) -> PretrainConfig:
    """Return the configuration of a new run.

    Args:
        asked: by the user, by key.
        images: size of the data set.
        processes: that train together.

    Raises:
        MapetError: for what cannot work: a wrong value, a network or objective that cannot be built, a batch that is
            too large, a token store of other views, a precision that the device lacks.
    """
    given = inherit(parse(PretrainConfig, asked))
    name = given.get("objective", default_of(PretrainConfig, "objective"))
    objective = _skeleton(name, given)
    kind = type(objective)
    targets = given.get("targets", kind.default_targets)
    check_targets(given, name, targets)
    published = {"targets": kind.default_targets, "masking": objective.masking, "mask_ratio": kind.default_mask_ratio}
    view, vocab_size = {}, given.get("vocab_size")
    if given.get("tokens") is not None:
        store = TokenStore(given["tokens"])
        view, vocab_size = settle_view(store, given), store.header.vocab_size
        check_grid(f"token store {str(store.folder)!r}", store.header.grid, objective.backbone.patch_embed.grid_size)
    elif targets == "ids":
        tokenizer = given.get("tokenizer") or "pixels"
        if not is_ready(tokenizer):
            check_fittable(tokenizer)
        vocab_size = settle_vocab_size(tokenizer, vocab_size, images * objective.patches)
    config = settle(
        PretrainConfig,
        given,
        images=images,
        processes=processes,
        precision=fast_precision(),
        published=published,
        patch_size=objective.backbone.patch_embed.patch_size[0],
        vocab_size=vocab_size,
        view=view,
    )
    check_precision(config.precision)
    return config


def _skeleton(name: str, given: Mapping[str, Any]) -> Objective:
    """Build the objective on the meta device, without memory or random numbers, to learn its sizes."""
    find_objective(name)
    defaults = {key: default_of(PretrainConfig, key) for key in PretrainConfig.model_fields}
    with torch.device("meta"):
        backbone = _build_backbone({**defaults, **given})
        return build_objective(
            name, backbone, Ids(2), given.get("mask_ratio"), given.get("masking"), given.get("objective_args")
        )


def _build_backbone(values: Mapping[str, Any]) -> VisionTransformer:
    keys = ("image_size", "patch_size", "channels", "drop_path", "layer_scale")
    return build_vit(values["model"], **{key: values[key] for key in keys}, **values["model_args"])


def initial_backbone(config: PretrainConfig) -> VisionTransformer:
    """Return the random backbone that a run with this configuration begins with, if it has no ``init``."""
    torch.manual_seed(fold_seed(config.seed, Stream.WEIGHTS))
    return _build_backbone(config.model_dump())
