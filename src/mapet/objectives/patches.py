"""Patches as rows: their pixels, their fixed positions, picking some of them."""

from timm.layers import build_sincos2d_pos_embed
from torch import Tensor

from mapet.errors import MapetError


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Pick rows ``index[b, m]`` of each ``x[b]``: ``(B, N, ...)`` and ``(B, M)`` give ``(B, M, ...)``."""
    if x.ndim == 2:
        return x.gather(1, index)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut ``(B, C, H, W)`` images into ``(B, P, p * p * C)`` rows of pixels, channels last, in raster order."""
    rows, columns = patch
    tiles = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # type: ignore[no-any-return]


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return MAE's fixed position embeddings ``(1, P, width)``: sines and cosines of the column, then of the row."""
    if width % 4:
        raise MapetError(f"sine-cosine positions need a width divisible by 4, not {width}")
    row_first = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True)
    return row_first.roll(width // 2, dims=-1)[None]  # type: ignore[no-any-return]
