"""Where continued pre-training begins: an earlier run, an exported or converted folder, or a timm model."""

import logging
from collections.abc import Mapping
from typing import Any

from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.config.base import Measured
from mapet.errors import MapetError
from mapet.inference.models import open_model
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.models.attention import use_layouts

logger = logging.getLogger(__name__)

# Arguments of timm's ViT that are keys of the configuration, or that every pre-training sets by itself.
SET_OTHERWISE = {
    "attn_drop_rate",
    "drop_path_rate",
    "drop_rate",
    "fc_norm",
    "global_pool",
    "img_size",
    "in_chans",
    "init_values",
    "num_classes",
    "patch_size",
    "pos_drop_rate",
    "proj_drop_rate",
}
# Arguments that change no weight and no output of the exported network, so a new run may choose them.
DROPOUT = {"attn_drop_rate", "pos_drop_rate", "proj_drop_rate"}
# Parts after the last norm of the blocks: they serve a classifier.
AFTER_NORM = ("fc_norm.", "attn_pool.", "head.", "head_drop.")


def inherit(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the given values by what ``init`` decides: the network's architecture, size and normalisation.

    Channels and image size may differ.

    Raises:
        MapetError: if the source cannot be had, is not a plain ViT, or a given value contradicts it.
    """
    values = dict(given)
    init = values.get("init")
    if init is None:
        return values
    opened = open_model(init, reinit=True)  # the architecture alone: weights are read once all else is settled
    try:
        network = use_layouts(opened.network)
    except MapetError as error:
        raise MapetError(f"init {init!r} cannot be pre-trained further: {error}") from error
    recorded = {key: value for key, value in network.pretrained_model_args.items() if value is not None}
    arguments = {key: value for key, value in recorded.items() if key not in SET_OTHERWISE}
    has_scale = any(".ls1." in key for key in network.state_dict())
    source: dict[str, Any] = {
        "model": network.pretrained_cfg["architecture"],
        "patch_size": network.patch_embed.patch_size[0],
        "layer_scale": recorded.get("init_values"),
    }
    asked = {key: values[key] for key in ("model", "patch_size") if key in values}
    if "model" in asked:
        asked["model"] = asked["model"].split(".")[0]
    wrong: list[tuple[str, Any, Any]] = [(key, values[key], source[key]) for key in asked if asked[key] != source[key]]
    if "layer_scale" in values and (values["layer_scale"] is not None) != has_scale:
        wrong.append(("layer_scale", values["layer_scale"], source["layer_scale"] or has_scale or None))
    own = values.get("model_args", {})
    wrong += [
        (f"model_args {key}", value, arguments.get(key, "the model's own"))
        for key, value in own.items()
        if key not in DROPOUT and arguments.get(key) != value
    ]
    for key, value, there in wrong:
        raise MapetError(
            f"{key} = {value!r} is asked for, but in init {init!r} it is {there!r}; leave it out to take that network"
        )
    rows, columns = opened.view.size
    if rows != columns and "image_size" not in values:
        raise MapetError(
            f"init {init!r} takes images of {rows} x {columns} pixels, and pre-training takes squares; pass "
            "--image-size, and its position embeddings are resized"
        )
    reading = opened.reading
    inherited: dict[str, Any] = {"channels": reading.channels, "image_size": rows, "value_range": reading.value_range}
    measured = Measured.DATA in (values.get("mean"), values.get("std"))
    if values.get("channels", reading.channels) == reading.channels and not measured:
        inherited |= {"mean": opened.view.mean, "std": opened.view.std}
    return {**inherited, **values, **source, "model_args": arguments | own}


def read_weights(config: PretrainConfig) -> dict[str, Tensor]:
    """Read the weights of the network that ``config.init`` names, for the image size and channels of the run.

    Raises:
        MapetError: if they cannot be had, or are not finite.
    """
    opened = open_model(str(config.init), image_size=(config.image_size, config.image_size))
    weights: dict[str, Tensor] = opened.network.state_dict()
    embedding = adapt_input_conv(
        config.channels, weights["patch_embed.proj.weight"], base_chans=opened.reading.channels
    )
    return weights | {"patch_embed.proj.weight": embedding}


def load_weights(backbone: VisionTransformer, weights: Mapping[str, Tensor], config: PretrainConfig) -> None:
    """Load weights of ``read_weights``; log which tensors were not taken over and which are drawn anew.

    Raises:
        MapetError: if they do not fit.
    """
    wanted = backbone.state_dict()
    left_out = [name for name in weights if name not in wanted]
    missing = [name for name in wanted if name not in weights]
    # A classifier that pools before its norm has no norm of tokens.
    anew = [name for name in missing if name.startswith("norm.") and "fc_norm.weight" in left_out]
    differing = [
        *(name for name in left_out if not name.startswith(AFTER_NORM)),
        *(name for name in missing if name not in anew),
        *(name for name in wanted if name in weights and weights[name].shape != wanted[name].shape),
    ]
    if differing:
        raise MapetError(
            f"init {config.init!r} does not fit model {config.model!r}: {differing[0]!r} is missing in one of them or "
            f"has another shape ({len(differing)} tensors differ)"
        )
    backbone.load_state_dict({name: weights.get(name, initial) for name, initial in wanted.items()})
    logger.info(
        "begins with the weights of %s; not taken over: %s; drawn anew: %s",
        config.init,
        ", ".join(left_out) or "nothing",
        ", ".join(anew) or "nothing",
    )
