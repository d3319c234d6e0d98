"""Vision Transformers: timm's, with attention that takes a layout."""

from mapet.models.layout_blocks import LayoutAttention, LayoutBlock, attend, use_layouts
from mapet.models.upstream import read_upstream, vit_from_upstream
from mapet.models.vit import build_vit

__all__ = [
    "LayoutAttention",
    "LayoutBlock",
    "attend",
    "build_vit",
    "read_upstream",
    "use_layouts",
    "vit_from_upstream",
]
