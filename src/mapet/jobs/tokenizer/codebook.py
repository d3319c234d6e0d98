"""A codebook: figures of its use, what they mean, and pictures of its codes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mapet.report.figures import ACCENT, INK, SECOND, as_picture, save_figure
from mapet.report.tables import Table
from mapet.tokenizers.base import Grid, Tokenizer

LEAST_PATCHES_PER_CODE = 10  # with fewer patches, a rare code may look like a dead one
ATLAS_CODES, ATLAS_PATCHES = 32, 16
MOST_PIXELS = 32  # larger patches of the atlas are shrunk to this side
SHOWN_PIXELS = 40  # least side of a patch as shown
GAP, GROUND = 4, 208  # pixels between patches and their grey, on which black and white patches are both visible
MARGIN, HEADER = 136, 40  # pixels left of the patches and above them


@dataclass(frozen=True)
class CodebookReport:
    """Figures of a codebook, measured on a sample of images. Entropies are in nats.

    Attributes:
        kind, content_hash, vocab_size, grid: of the tokenizer.
        images, patches: number of images and patches in the sample.
        used_codes: number of codes that at least one patch has; ``dead_codes`` is the number of the others.
        usage_share: ``used_codes / vocab_size``.
        unigram_entropy: entropy of the ids' frequencies, which is the loss of a model that ignores the image.
        perplexity: ``exp(unigram_entropy)``: the number of equally frequent codes with the same entropy.
        top_share: share of patches that have the most frequent code, which is the accuracy of always guessing it.
        mean_distance: mean distance between a patch and its code, in the tokenizer's own measure.
    """

    kind: str
    content_hash: str
    vocab_size: int
    grid: Grid
    images: int
    patches: int
    used_codes: int
    dead_codes: int
    usage_share: float
    unigram_entropy: float
    perplexity: float
    top_share: float
    mean_distance: float


def measure_codebook(tokenizer: Tokenizer, ids: Tensor, distances: Tensor) -> CodebookReport:
    """Return the figures of a tokenizer's codebook.

    Args:
        tokenizer: the tokenizer.
        ids, distances: ``(N, P)`` for ``N`` images, as the tokenizer returned them, on the CPU.
    """
    vocab_size, patches = tokenizer.vocab_size, ids.numel()
    counts = torch.bincount(ids.flatten(), minlength=vocab_size)
    used = int((counts > 0).sum())
    entropy = float(torch.special.entr(counts.double() / patches).sum())
    # Summed image by image: the order of the sum, and so its rounding, is that of earlier versions.
    total_distance = np.cumsum(distances.double().numpy().sum(axis=1))[-1]
    return CodebookReport(
        kind=tokenizer.kind,
        content_hash=tokenizer.content_hash,
        vocab_size=vocab_size,
        grid=tokenizer.grid,
        images=len(ids),
        patches=patches,
        used_codes=used,
        dead_codes=vocab_size - used,
        usage_share=used / vocab_size,
        unigram_entropy=entropy,
        perplexity=math.exp(entropy),
        top_share=int(counts.max()) / patches,
        mean_distance=float(total_distance) / patches,
    )


def shortcomings(report: CodebookReport) -> list[str]:
    """Return a sentence for each problem of a codebook: what is wrong and what to do."""
    found = []
    if report.patches < LEAST_PATCHES_PER_CODE * report.vocab_size:
        found.append(
            f"{report.patches:,} patches are too few to tell how {report.vocab_size:,} codes are used: measure on "
            f"more images, with at least {LEAST_PATCHES_PER_CODE} patches a code."
        )
    elif report.usage_share < 0.5:
        found.append(
            f"only {report.used_codes:,} of {report.vocab_size:,} codes are used: fit with a smaller --vocab-size, "
            "or on more images, which should be of the same kind as these."
        )
    if report.top_share > 0.5:
        brightness = ", or --no-contrast to tell flat patches apart by brightness" * (report.kind == "pixels")
        found.append(
            f"one code has {report.top_share:.0%} of all patches, as where much of the images is flat background: "
            f"crop them closer or fit on a teacher's features{brightness}."
        )
    return found


def report_table(report: CodebookReport) -> Table:
    """Return the report as a table."""
    rows, columns = report.grid
    even = report.perplexity / report.vocab_size
    lines = [
        ["images", f"{report.images:,}", f"{report.patches:,} patches, {rows} x {columns} per image"],
        ["used codes", f"{report.used_codes:,}", f"{report.usage_share:.1%}; {report.dead_codes:,} dead"],
        ["perplexity", f"{report.perplexity:,.1f}", f"{even:.1%} of all codes in even use"],
        ["most frequent code", f"{report.top_share:.1%}", "of patches: accuracy of guessing it"],
        ["unigram entropy", f"{report.unigram_entropy:.3f} nats", "loss without looking at the image"],
        ["mean distance", f"{report.mean_distance:.4g}", "between a patch and its code"],
    ]
    title = f"codebook: {report.kind}, {report.vocab_size:,} codes, {report.content_hash[:12]}"
    return Table(["", "", ""], lines, title)


def spread_codes(counts: Tensor, most: int) -> list[int]:
    """Return used codes, evenly spread over their ranking from the most to the least frequent.

    Args:
        counts: ``(V,)``, number of patches of each code.
        most: number of codes to return, or all used codes if there are fewer.
    """
    used = int((counts > 0).sum())
    ranking = counts.argsort(descending=True, stable=True)[:used]
    return ranking[torch.linspace(0, used - 1, min(used, most)).round().long()].tolist()


def nearest_patches(ids: Tensor, distances: Tensor, code: int, most: int) -> list[tuple[int, int]]:
    """Return the (image, patch) numbers of the patches nearest to a code, nearest first, at most one of each image.

    Args:
        ids, distances: ``(N, P)``, on the CPU. Of patches with the same distance, those of earlier images come first.
        code: an id.
        most: number of patches to return, or all if there are fewer.
    """
    images, patches = (numbers.numpy() for numbers in (ids == code).nonzero(as_tuple=True))
    order = np.argsort(distances[images, patches].numpy(), kind="stable")
    _, first = np.unique(images[order], return_index=True)
    chosen = order[np.sort(first)[:most]]
    return list(zip(images[chosen].tolist(), patches[chosen].tolist(), strict=True))


def cut_patch(view: Tensor, grid: Grid, number: int) -> Tensor:
    """Return a patch of a view as uint8 ``(C, h, w)``, with at most ``MOST_PIXELS`` a side.

    Args:
        view: ``(C, H, W)`` in [0, 1]. If patches do not tile it, it is enlarged: a teacher may read images of any size.
        grid: rows and columns of patches.
        number: of the patch, in raster order.
    """
    height, width = (-(-side // count) for side, count in zip(view.shape[-2:], grid, strict=True))
    tiled = F.interpolate(view[None], (height * grid[0], width * grid[1]), mode="bilinear")
    row, column = divmod(number, grid[1])
    patch = tiled[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
    small = F.interpolate(patch, (min(height, MOST_PIXELS), min(width, MOST_PIXELS)), mode="area")[0]
    return (small * 255).round().byte()


def plot_atlas(ids: Tensor, distances: Tensor, grid: Grid, view: Callable[[int], Tensor], path: Path) -> None:
    """Draw a row for some of the codes: its id, its share of all patches, and the patches nearest to it.

    Patches are enlarged by the smallest whole number that makes their shorter side at least ``SHOWN_PIXELS``.

    Args:
        ids, distances: ``(N, P)``, on the CPU.
        grid: rows and columns of patches.
        view: returns the view of an image, see ``cut_patch``.
        path: PNG file to write.
    """
    counts = torch.bincount(ids.flatten())
    codes = spread_codes(counts, ATLAS_CODES)
    height, width = cut_patch(view(0), grid, 0).shape[-2:]
    scale = -(-SHOWN_PIXELS // min(height, width))
    height, width = height * scale, width * scale
    size = (MARGIN + ATLAS_PATCHES * (width + GAP) + GAP, HEADER + len(codes) * (height + GAP) + GAP)
    page = Image.new("RGB", size, "white")
    page.paste((GROUND,) * 3, (MARGIN, HEADER, page.width, page.height))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    draw.text((58, HEADER / 2), "code", INK, font, anchor="rm")
    draw.text((MARGIN - 12, HEADER / 2), "share", INK, font, anchor="rm")
    draw.text((MARGIN, HEADER / 2), "nearest patches, nearest first", INK, font, anchor="lm")
    for number, code in enumerate(codes):
        top = HEADER + GAP + number * (height + GAP)
        middle = top + height / 2
        draw.text((58, middle), str(code), ACCENT, font, anchor="rm")
        share = float(counts[code] / counts.sum())
        draw.text((MARGIN - 12, middle), f"{share:.2%}" if share >= 1e-4 else "< 0.01%", INK, font, anchor="rm")
        for column, (image, patch) in enumerate(nearest_patches(ids, distances, code, ATLAS_PATCHES)):
            pixels = (as_picture(cut_patch(view(image), grid, patch).float() / 255) * 255).round().byte().numpy()
            enlarged = Image.fromarray(pixels).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            page.paste(enlarged, (MARGIN + GAP + column * (width + GAP), top))
    page.save(path)


def plot_usage(ids: Tensor, vocab_size: int, path: Path) -> None:
    """Plot the share of patches over the rank of the code, both logarithmic, beside codes in even use.

    Args:
        ids: of any shape, on the CPU.
        vocab_size: ``V``.
        path: PNG file to write.
    """
    used = torch.unique(ids, return_counts=True)[1].sort(descending=True).values
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    panel = figure.subplots()
    ranks, shares = np.arange(1, len(used) + 1), (used / used.sum()).numpy()
    label = f"{len(used):,} used codes"
    panel.loglog(ranks, shares, color=ACCENT, linewidth=1.8, marker="o", markersize=2.5, label=label)
    label = f"all {vocab_size:,} codes, evenly"
    panel.plot([1, vocab_size], [1 / vocab_size] * 2, color=SECOND, linewidth=1.2, linestyle="--", label=label)
    panel.set(xlabel="rank of the code", ylabel="share of patches")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
