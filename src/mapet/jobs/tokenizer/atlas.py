"""Pictures of a codebook: what its codes look like, and how often they are used."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mapet.report.figures import ACCENT, INK, SECOND, save_figure
from mapet.tokenizers.base import Grid

MOST_PIXELS = 32  # larger patches are shrunk to this side
SHOWN_PIXELS = 40  # least side of a patch in the atlas
GAP, GROUND = 4, 208  # pixels between patches and their grey, on which black and white patches are both visible
MARGIN, HEADER = 136, 40  # pixels left of the patches and above them


@dataclass(frozen=True)
class AtlasRow:
    """A code and the patches nearest to it.

    Attributes:
        code: the id.
        share: share of all patches that have the code.
        patches: uint8 ``(C, h, w)`` each, nearest first; all rows of an atlas have the same ``h`` and ``w``.
    """

    code: int
    share: float
    patches: Sequence[Tensor]


def cut_patch(view: Tensor, grid: Grid, number: int) -> Tensor:
    """Return a patch of a view as uint8 ``(C, h, w)``, with at most ``MOST_PIXELS`` a side.

    Args:
        view: ``(C, H, W)`` in [0, 1]. If patches do not tile it, it is enlarged: a teacher may read images of any size.
        grid: rows and columns of patches.
        number: of the patch, in raster order.
    """
    height, width = (-(-side // count) for side, count in zip(view.shape[-2:], grid, strict=True))
    if view.shape[-2:] != (height * grid[0], width * grid[1]):
        view = F.interpolate(view[None], (height * grid[0], width * grid[1]), mode="bilinear")[0]
    row, column = divmod(number, grid[1])
    patch = view[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
    small = (min(height, MOST_PIXELS), min(width, MOST_PIXELS))
    if small != (height, width):
        patch = F.interpolate(patch[None], small, mode="area")[0]
    return (patch * 255).round().byte()


def plot_atlas(rows: Sequence[AtlasRow], columns: int, path: Path) -> None:
    """Draw a row for each code: its id, its share of all patches, and its nearest patches.

    Patches are enlarged by the smallest whole number that makes their shorter side at least ``SHOWN_PIXELS``.

    Args:
        rows: at least one.
        columns: the largest number of patches in a row.
        path: PNG file to write.
    """
    height, width = rows[0].patches[0].shape[-2:]
    scale = -(-SHOWN_PIXELS // min(height, width))
    height, width = height * scale, width * scale
    page = Image.new(
        "RGB", (MARGIN + columns * (width + GAP) + GAP, HEADER + len(rows) * (height + GAP) + GAP), "white"
    )
    page.paste((GROUND,) * 3, (MARGIN, HEADER, page.width, page.height))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    draw.text((58, HEADER / 2), "code", INK, font, anchor="rm")
    draw.text((MARGIN - 12, HEADER / 2), "share", INK, font, anchor="rm")
    draw.text((MARGIN, HEADER / 2), "nearest patches, nearest first", INK, font, anchor="lm")
    for number, row in enumerate(rows):
        top = HEADER + GAP + number * (height + GAP)
        middle = top + height / 2
        draw.text((58, middle), str(row.code), ACCENT, font, anchor="rm")
        share = f"{row.share:.2%}" if row.share >= 1e-4 else "< 0.01%"
        draw.text((MARGIN - 12, middle), share, INK, font, anchor="rm")
        for column, patch in enumerate(row.patches):
            pixels = Image.fromarray(patch.expand(3, -1, -1).permute(1, 2, 0).numpy())
            enlarged = pixels.resize((width, height), Image.Resampling.NEAREST)
            page.paste(enlarged, (MARGIN + GAP + column * (width + GAP), top))
    page.save(path)


def plot_usage(counts: Tensor, path: Path) -> None:
    """Plot the share of patches over the rank of the code, both logarithmic, beside codes in even use.

    Args:
        counts: ``(V,)``, number of patches of each code.
        path: PNG file to write.
    """
    vocab_size = len(counts)
    used = counts[counts > 0].sort(descending=True).values
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    panel = figure.subplots()
    ranks, shares = np.arange(1, len(used) + 1), (used / counts.sum()).numpy()
    style: dict[str, Any] = {"color": ACCENT, "linewidth": 1.8, "marker": "o", "markersize": 2.5}
    panel.loglog(ranks, shares, label=f"{len(used):,} used codes", **style)
    style = {"color": SECOND, "linewidth": 1.2, "linestyle": "--"}
    panel.plot([1, vocab_size], [1 / vocab_size] * 2, label=f"all {vocab_size:,} codes, evenly", **style)
    panel.set_xlabel("rank of the code")
    panel.set_ylabel("share of patches")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
