"""Build a timm Vision Transformer for pre-training."""

from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer

from mapet.errors import MapetError, nearest
from mapet.models.attention import use_layouts
from mapet.models.released import RELEASED


def build_vit(
    name: str,
    *,
    image_size: int,
    patch_size: int | None = None,
    channels: int = 3,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    **model_args: Any,
) -> VisionTransformer:
    """Create a randomly initialised timm ViT without a classifier, ready for the objectives.

    The final norm is applied to every token. The pooled feature is the mean over patches, so that ``forward`` of the
    exported model returns the feature to use: pre-training does not train the output of the class token.

    Args:
        name: a timm model name, for instance ``vit_small_patch16_224``.
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels; None keeps the named model's.
        channels: 1 or 3 input channels.
        drop_path: stochastic depth rate of the last block.
        layer_scale: initial LayerScale; None keeps the named model's, which in most models is none.
        model_args: further arguments of timm's ``VisionTransformer``, e.g. ``depth=4``.

    Raises:
        MapetError: for an unknown model or argument, or an image that patches do not tile.
    """
    if name in RELEASED:
        raise MapetError(f"{name!r} names weights, not an architecture; pass the weights to --init instead of --model")
    if not timm.is_model(name):
        vits = timm.list_models("vit_*")
        raise MapetError(f"unknown model {name!r}{nearest(name, vits) or '; see timm.list_models()'}")
    try:
        backbone = timm.create_model(
            name,
            num_classes=0,
            img_size=image_size,
            patch_size=patch_size,
            in_chans=channels,
            init_values=layer_scale,
            drop_path_rate=drop_path,
            global_pool="avg",
            fc_norm=False,
            **model_args,
        )
    except (TypeError, AssertionError, ValueError, RuntimeError, KeyError, OSError, ArithmeticError) as error:
        if "'img_size'" in str(error):
            raise MapetError(f"model {name!r} is not a plain Vision Transformer; choose a vit_* model") from error
        raise MapetError(f"timm cannot build model {name!r} with these arguments: {error}") from error
    use_layouts(backbone)
    if not len(backbone.blocks):
        raise MapetError(f"model {name!r} would have no block; take a depth of at least 1")
    side = backbone.patch_embed.patch_size[0]
    if image_size % side:
        lower = max(side, image_size // side * side)
        raise MapetError(
            f"image size {image_size} is not divisible by the patch size {side} of {name!r}; "
            f"take {lower} or {lower + side}"
        )
    return backbone
