"""Vision Transformers: timm's, with attention that takes a layout."""

from mapet.models.layout_blocks import LayoutAttention, LayoutBlock, attend, cpu_has_bfloat16, use_layouts
from mapet.models.peers import beit_blueprint, beitv2_blueprint, mae_blueprint, recognise
from mapet.models.published import Blueprint
from mapet.models.released import RELEASED, released_folder
from mapet.models.tensors import check_fit, read_tensors
from mapet.models.upstream import PRETRAINING_NAMES, read_upstream, upstream_blueprint, vit_from_upstream
from mapet.models.vit import build_vit

__all__ = [
    "PRETRAINING_NAMES",
    "RELEASED",
    "Blueprint",
    "LayoutAttention",
    "LayoutBlock",
    "attend",
    "beit_blueprint",
    "beitv2_blueprint",
    "build_vit",
    "check_fit",
    "cpu_has_bfloat16",
    "mae_blueprint",
    "read_tensors",
    "read_upstream",
    "recognise",
    "released_folder",
    "upstream_blueprint",
    "use_layouts",
    "vit_from_upstream",
]
