"""Vision Transformers: timm's, with attention that takes a layout."""

from mapet.models.layout_blocks import LayoutAttention, LayoutBlock, attend, cpu_has_bfloat16, use_layouts
from mapet.models.upstream import read_upstream, vit_from_upstream
from mapet.models.vit import build_vit

__all__ = [
    "LayoutAttention",
    "LayoutBlock",
    "attend",
    "build_vit",
    "cpu_has_bfloat16",
    "read_upstream",
    "use_layouts",
    "vit_from_upstream",
]
