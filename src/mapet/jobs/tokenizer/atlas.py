"""Pictures of a codebook: what its codes stand for, and how often they are used."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mapet.engine.files import replace_file
from mapet.jobs.tokenizer.codebook import Atlas, CodebookReport, CodebookStatistics
from mapet.report.figures import ACCENT, INK, SECOND, plot_tokens, save_figure

SHOWN_PIXELS = 40  # least side of a patch in the atlas
GAP, GROUND = 4, 208  # pixels between patches and their grey, on which black and white patches both stand out
MARGIN, HEADER = 136, 40  # pixels left of the patches and above them


def write_codebook_report(
    report: CodebookReport, statistics: CodebookStatistics, example_views: Tensor, example_ids: Tensor, folder: Path
) -> None:
    """Write ``report.json``, ``atlas.png``, ``token_maps.png`` and ``usage.png`` into an existing folder.

    Args:
        report: what the statistics come to.
        statistics: of at least one image.
        example_views: ``(B, C, H, W)`` in [0, 1], for the token maps; some eight fit side by side.
        example_ids: ``(B, P)``.
        folder: to write into; files of these names are replaced.
    """
    replace_file(folder / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    plot_atlas(statistics.atlas(), folder / "atlas.png")
    plot_tokens(example_views.cpu(), example_ids.cpu(), report.grid, report.vocab_size, folder / "token_maps.png")
    plot_usage(statistics.counts, folder / "usage.png")


def atlas_array(atlas: Atlas) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Lay out an atlas as an ``(H, W, 3)`` picture: a row a code, nearest patches first, grey where there are none.

    Patches are enlarged by the least whole number that makes their shorter side ``SHOWN_PIXELS``, and have ``GAP``
    grey pixels on each side.
    """
    scale = -(-SHOWN_PIXELS // min(atlas.pixels.shape[-2:]))
    patches = atlas.pixels.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    patches = patches.where(atlas.distances.isfinite()[:, :, None, None, None], GROUND)
    patches = F.pad(patches, (0, GAP, 0, GAP), value=GROUND)
    # (R, k, C, h, w) to (R, h, k, w, C)
    picture = patches.expand(-1, -1, 3, -1, -1).permute(0, 3, 1, 4, 2)
    picture = picture.flatten(2, 3).flatten(0, 1)
    return F.pad(picture, (0, 0, GAP, 0, GAP, 0), value=GROUND).numpy()


def plot_atlas(atlas: Atlas, path: Path) -> None:
    """Draw an atlas with each code's id and share of the patches beside its row; patches are pixel for pixel."""
    patches = Image.fromarray(atlas_array(atlas))
    page = Image.new("RGB", (MARGIN + patches.width, HEADER + patches.height), "white")
    page.paste(patches, (MARGIN, HEADER))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    draw.text((58, HEADER / 2), "code", INK, font, anchor="rm")
    draw.text((MARGIN - 12, HEADER / 2), "share", INK, font, anchor="rm")
    draw.text((MARGIN, HEADER / 2), "nearest patches, nearest first", INK, font, anchor="lm")
    row = (patches.height - GAP) / len(atlas.codes)
    for number, (code, share) in enumerate(zip(atlas.codes.tolist(), atlas.shares.tolist(), strict=True)):
        middle = HEADER + (number + 0.5) * row + GAP / 2
        draw.text((58, middle), str(code), ACCENT, font, anchor="rm")
        draw.text((MARGIN - 12, middle), f"{share:.2%}" if share >= 1e-4 else "< 0.01%", INK, font, anchor="rm")
    page.save(path)


def plot_usage(counts: Tensor, path: Path) -> None:
    """Draw the share of patches over the rank of the code, both logarithmic, beside codes that are used evenly.

    Args:
        counts: ``(V,)``, patches of each code.
        path: of the PNG.
    """
    vocab_size = len(counts)
    used = counts[counts > 0].sort(descending=True).values
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    panel = figure.subplots()
    panel.loglog(
        np.arange(1, len(used) + 1),
        (used / counts.sum()).numpy(),
        color=ACCENT,
        linewidth=1.8,
        marker="o",
        markersize=2.5,
        label=f"{len(used):,} used codes",
    )
    panel.plot(
        [1, vocab_size],
        [1 / vocab_size] * 2,
        color=SECOND,
        linestyle="--",
        linewidth=1.2,
        label=f"all {vocab_size:,} codes, evenly",
    )
    panel.set_xlabel("rank of the code")
    panel.set_ylabel("share of patches")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
