"""timm networks: a new ViT for pre-training, or a network that a folder or a name tells, with its weights."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer

from mapet.errors import MapetError, nearest, reason_of
from mapet.models.attention import use_layouts

# Backbones that come with the package: folders as ``mapet export timm`` writes them; each has a README.md that says how
# the backbone was made and how good it is.
RELEASED = {"mapet-micro-fashion-mnist": Path(__file__).parent.parent / "weights" / "mapet-micro-fashion-mnist"}

EXPORTED_FILES = ("config.json", "model.safetensors")


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
        channels: input channels.
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


def find_network(source: str) -> str | None:
    """Return timm's name of a network: ``local-dir:`` and the folder of an export, or a name of timm's unchanged.

    None means that there is no such network.

    Args:
        source: a run folder (its ``exported/`` is taken), an exported folder, a name in ``RELEASED``, or a timm model
            name, perhaps with ``local-dir:`` or ``hf-hub:``. A folder comes before a name.
    """
    folder = source.removeprefix("local-dir:")
    # os.path, not pathlib: the name may be recorded and stays as it was written, and os.path returns False for text
    # that cannot be a file name, where pathlib raises.
    if os.path.isdir(folder):  # noqa: PTH112
        for place in (os.path.join(folder, "exported"), folder):  # noqa: PTH118
            if all(os.path.isfile(os.path.join(place, file)) for file in EXPORTED_FILES):  # noqa: PTH113, PTH118
                return f"local-dir:{place}"
        return None
    if source in RELEASED:
        return f"local-dir:{RELEASED[source]}"
    is_elsewhere = ":" in source and source == folder
    return source if is_elsewhere or timm.is_model(source) else None


def create_network(name: str, *, pretrained: bool, any_size: bool = False, **arguments: Any) -> Any:
    """Build a timm network, on the CPU.

    Args:
        name: timm's, as ``find_network`` returns it.
        pretrained: load its weights; else they are random.
        any_size: let a ViT read images of any size; other networks do so anyway.
        arguments: of ``timm.create_model``.

    Raises:
        MapetError: if the network cannot be built, its exported folder is damaged, or its weights cannot be fetched.
    """
    try:
        if any_size:
            with suppress(TypeError):  # only ViTs have the argument
                return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, **arguments)
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # of the file system, safetensors, the hub's HTTP library, torch
        if "drop_path_rate" in str(error):
            raise MapetError(f"model {name!r} has no stochastic depth; pass --drop-path 0") from error
        if name.startswith("local-dir:"):
            folder = Path(name.removeprefix("local-dir:"))
            damaged = folder / "config.json" if isinstance(error, json.JSONDecodeError) else folder
            raise MapetError(
                f"{damaged} is damaged ({reason_of(error)}); restore it or export the model again"
            ) from error
        raise unfetched(name, error) from error


def unfetched(name: str, error: Exception) -> MapetError:
    """Return the error for a network that a library cannot build or fetch."""
    return MapetError(
        f"model {name!r} could not be fetched or built ({reason_of(error)}); check the connection, or name a local "
        "folder (for a teacher also a file with --teacher-weights)"
    )
