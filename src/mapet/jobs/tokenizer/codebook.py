"""Whether a tokenizer's codebook is any good: how its ids are used, and what they stand for, in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from mapet.errors import MapetError
from mapet.tokenizers.base import Grid, Tokenizer

MOST_PIXELS = 32  # side of a kept patch; larger ones are shrunk
MOST_PAIR_PATCHES = 1 << 24  # patches whose ids are kept to count neighbours: 64 MiB
LEAST_PATCHES_PER_CODE = 10  # fewer do not tell a dead code from a rare one
LEAST_COVERAGE = 0.9  # of neighbouring pairs; above, their entropy was within 0.2 nats of the truth in simulations
LEAST_GAIN = 0.05  # of the unigram entropy


@dataclass(frozen=True)
class CodebookReport:
    """What is to be said of a codebook on a sample of images. Entropies are in nats.

    Attributes:
        kind, content_hash, vocab_size, grid: of the tokenizer.
        images, patches: of the sample.
        used_codes: codes that at least one patch has; ``dead_codes`` are the others.
        usage_share: ``used_codes / vocab_size``.
        unigram_entropy: of the ids' frequencies, which is the loss of a model that does not look at the image.
        perplexity: ``exp(unigram_entropy)``: as many codes, equally frequent, would have the same entropy.
        top_share: share of patches that have the most frequent code, which is the accuracy of always guessing it.
        entropy_given_left, entropy_given_above: conditional entropy of an id given that of the patch to its left or
            above it, estimated as ``chao_shen`` of the pairs less that of the given ids, and at most the unigram
            entropy; None where the grid has no such pair. What they lie below the unigram entropy is what one neighbour
            tells. Both are there since stripes and horizons make them differ.
        pairs: neighbours, of both directions, that the conditional entropies rest on.
        pair_coverage: estimated share of all pairs in such images that are among those seen (Good, "The population
            frequencies of species and the estimation of population parameters", 1953: 1 less the share of pairs seen
            once), in the worse direction; None without pairs. Where it is low the conditional entropies are rough.
        mean_distance: of a patch from its code, in the tokenizer's own measure.
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
    entropy_given_left: float | None
    entropy_given_above: float | None
    pairs: int
    pair_coverage: float | None
    mean_distance: float

    @property
    def neighbours_are_sampled(self) -> bool:
        """Whether enough pairs were seen for the conditional entropies to be taken at their word."""
        return self.pair_coverage is not None and self.pair_coverage >= LEAST_COVERAGE


@dataclass(frozen=True)
class Atlas:
    """Codes and the patches that are nearest to them, nearest first, at most one from an image.

    Attributes:
        codes, shares: ``(R,)``, ids and their shares of all patches.
        distances: ``(R, k)``; infinite where there is no patch.
        images: ``(R, k)``, the image's number in the order of coming, from 0.
        pixels: ``(R, k, C, h, w)`` uint8, arbitrary where there is no patch.
    """

    codes: Tensor
    shares: Tensor
    distances: Tensor
    images: Tensor
    pixels: Tensor


class CodebookStatistics:
    """Gathers all that the report needs in one pass over batches; how the images are batched makes no difference.

    Memory is bounded, whatever the number of images. For each code the nearest patches are kept: with 8192 codes, 100
    MB for colour patches of 16 x 16 pixels and 400 MB for those of 32 x 32 or more. To count neighbours, the ids of the
    first images are kept, 2^24 patches in 64 MiB (85,000 images of 14 x 14), so images should come in random order;
    counting them takes up to 600 MB for a moment, but never a table of ``vocab_size ** 2``.

    Args:
        tokenizer: whose ids they are.
        atlas_codes: how many codes the atlas shows.
        atlas_patches: how many patches it shows of each.
    """

    def __init__(self, tokenizer: Tokenizer, atlas_codes: int = 32, atlas_patches: int = 16) -> None:
        self.kind, self.content_hash = tokenizer.kind, tokenizer.content_hash
        self.vocab_size, self.grid = tokenizer.vocab_size, tokenizer.grid
        self.counts = torch.zeros(self.vocab_size, dtype=torch.long)
        self.images = 0
        self._atlas_codes = atlas_codes
        self._nearest = _NearestPatches(self.vocab_size, atlas_patches)
        self._kept_ids: list[Tensor] = []
        self._distance = 0.0

    def add(self, views: Tensor, ids: Tensor, distances: Tensor) -> None:
        """Take a batch, on any device.

        Args:
            views: ``(B, C, H, W)`` in [0, 1], all of one size, as the tokenizer was given them.
            ids, distances: ``(B, P)``, what it gave.
        """
        rows, columns = self.grid
        if views.shape[-2] % rows or views.shape[-1] % columns:  # a teacher may see images of any size
            tiled = [-(-views.shape[-2] // rows) * rows, -(-views.shape[-1] // columns) * columns]
            views = F.interpolate(views, tiled, mode="bilinear")
        ids, distances = ids.cpu(), distances.cpu()
        self.counts += torch.bincount(ids.flatten(), minlength=self.vocab_size)
        # Image by image: sums of a batch would round differently from batch size to batch size.
        for total in distances.double().numpy().sum(axis=1).tolist():
            self._distance += total
        if room := max(0, MOST_PAIR_PATCHES // (rows * columns) - self.images):
            self._kept_ids.append(ids[:room].int())
        tiles = views.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        self._nearest.add(tiles, ids, distances, self.images)
        self.images += len(ids)

    def report(self) -> CodebookReport:
        """Return what was found so far.

        Raises:
            MapetError: if no image was added.
        """
        if not self.images:
            raise MapetError("a codebook report needs at least one image, but none was given; pass more images")
        patches, used = int(self.counts.sum()), int((self.counts > 0).sum())
        entropy = float(torch.special.entr(self.counts.double() / patches).sum())
        maps = torch.cat(self._kept_ids).reshape(-1, *self.grid)
        # A direction without pairs is left out: a grid may have one column or one row.
        left = self._neighbours(maps[:, :, :-1], maps[:, :, 1:]) if self.grid[1] > 1 else None
        above = self._neighbours(maps[:, :-1], maps[:, 1:]) if self.grid[0] > 1 else None
        both = [found for found in (left, above) if found]
        return CodebookReport(
            kind=self.kind,
            content_hash=self.content_hash,
            vocab_size=self.vocab_size,
            grid=self.grid,
            images=self.images,
            patches=patches,
            used_codes=used,
            dead_codes=self.vocab_size - used,
            usage_share=used / self.vocab_size,
            unigram_entropy=entropy,
            perplexity=math.exp(entropy),
            top_share=int(self.counts.max()) / patches,
            entropy_given_left=min(left.entropy, entropy) if left else None,
            entropy_given_above=min(above.entropy, entropy) if above else None,
            pairs=sum(found.pairs for found in both),
            pair_coverage=min((found.coverage for found in both), default=None),
            mean_distance=self._distance / patches,
        )

    def atlas(self) -> Atlas:
        """Return used codes, evenly spread over their ranking from the most to the least frequent, and their patches.

        Raises:
            MapetError: if no image was added.
        """
        if self._nearest.pixels is None:
            raise MapetError("a codebook atlas needs at least one image, but none was given; pass more images")
        used = int((self.counts > 0).sum())
        ranking = self.counts.argsort(descending=True, stable=True)[:used]
        codes = ranking[torch.linspace(0, used - 1, min(used, self._atlas_codes)).round().long()]
        distances = torch.from_numpy(self._nearest.distances)[codes]
        images = torch.from_numpy(self._nearest.images)[codes]
        order = images.argsort(dim=1)
        order = order.gather(1, distances.gather(1, order).argsort(dim=1, stable=True))
        return Atlas(
            codes=codes,
            shares=self.counts[codes] / self.counts.sum(),
            distances=distances.gather(1, order),
            images=images.gather(1, order),
            pixels=self._nearest.pixels[codes[:, None], order],
        )

    def _neighbours(self, given: Tensor, ids: Tensor) -> _Neighbours:
        counts = torch.unique((given.long() * self.vocab_size + ids).flatten(), return_counts=True)[1]
        entropy = chao_shen(counts) - chao_shen(torch.bincount(given.flatten()))
        return _Neighbours(entropy, ids.numel(), 1 - int((counts == 1).sum()) / ids.numel())


@dataclass(frozen=True)
class _Neighbours:
    entropy: float
    pairs: int
    coverage: float


def chao_shen(counts: Tensor) -> float:
    """Estimate the entropy in nats of what ``counts``, one for each kind, are a sample of.

    The entropy of the sample's own frequencies is far too low where there are nearly as many kinds as draws, as there
    are for pairs of ids, and Miller and Madow's correction adds at most half a nat: 400,000 pairs of independent,
    equally frequent ids out of 8192 come to 3.9 nats given the first and 4.4 corrected, but are 9.0. This estimator
    finds 9.1. It scales frequencies by the coverage of the sample, and weighs each kind by the inverse of its
    probability to be in it. Where ids do depend on each other and coverage is low, it is still too low.

    Source: Chao & Shen, "Nonparametric estimation of Shannon's index of diversity when there are unseen species in
    sample" (2003); for a sample in which each kind was seen once, one is taken to have been seen twice,
    as in the R package entropy.
    """
    counts = counts[counts > 0].double()
    size = counts.sum()
    once = min(int((counts == 1).sum()), int(size) - 1)
    share = (1 - once / size) * counts / size
    seen = -torch.expm1(size * torch.log1p(-share))
    return float((torch.special.entr(share) / seen).sum())


class _NearestPatches:
    """For each code the patches that are nearest to it, at most one of an image, in no order.

    Of equally near ones the first image's is kept.

    Attributes:
        distances, images: ``(V, k)``; infinity and the largest integer where there is no patch.
        pixels: ``(V, k, C, h, w)`` uint8; None before the first batch.
    """

    def __init__(self, vocab_size: int, count: int) -> None:
        self.distances = np.full((vocab_size, count), np.inf, dtype=np.float32)
        self.images = np.full((vocab_size, count), np.iinfo(np.int64).max)
        self.pixels: Tensor | None = None

    def add(self, tiles: Tensor, ids: Tensor, distances: Tensor, first_image: int) -> None:
        """Take ``(B, rows, columns, C, h, w)`` patches, and ``(B, P)`` ids and distances on the CPU."""
        count = self.distances.shape[1]
        codes, found = ids.flatten().numpy(), distances.flatten().numpy()
        images = first_image + np.arange(len(ids)).repeat(ids.shape[1])

        new = np.flatnonzero(found < self.distances.max(axis=1)[codes])
        new = new[np.lexsort((found[new], images[new], codes[new]))]
        new = new[_is_first(codes[new], images[new])]

        # Slots of the codes concerned compete with the newcomers. Both are in the order of codes, and as many slots
        # of a code become free as newcomers win, so those that win fit the free slots one by one.
        slots = (np.unique(codes[new])[:, None] * count + np.arange(count)).flatten()
        all_codes = np.concatenate([slots // count, codes[new]])
        all_images = np.concatenate([self.images.flat[slots], images[new]])
        all_distances = np.concatenate([self.distances.flat[slots], found[new]])
        order = np.lexsort((all_images, all_distances, all_codes))
        rank = np.arange(len(order)) - np.searchsorted(all_codes[order], all_codes[order])
        wins = np.empty(len(order), dtype=bool)
        wins[order] = rank < count
        free, taken = slots[~wins[: len(slots)]], new[wins[len(slots) :]]

        if not len(taken):
            return
        self.distances.flat[free], self.images.flat[free] = found[taken], images[taken]
        cells = torch.from_numpy(np.stack(np.unravel_index(taken, tiles.shape[:3])))
        pixels = _as_bytes(tiles[tuple(cells)])
        if self.pixels is None:
            self.pixels = torch.empty(*self.distances.shape, *pixels.shape[1:], dtype=torch.uint8)
        self.pixels.flatten(0, 1)[torch.from_numpy(free)] = pixels


def _is_first(*keys: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each entry differs in any key from the one before it."""
    differs = np.ones(len(keys[0]), dtype=bool)
    differs[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return differs


def _as_bytes(patches: Tensor) -> Tensor:
    """Turn ``(n, C, h, w)`` in [0, 1] into uint8 on the CPU, shrunk to at most ``MOST_PIXELS`` a side."""
    height, width = (min(side, MOST_PIXELS) for side in patches.shape[-2:])
    if patches.shape[-2:] != (height, width):
        patches = F.interpolate(patches, (height, width), mode="area")
    return (patches * 255).round().to("cpu", torch.uint8)


def shortcomings(report: CodebookReport) -> list[str]:
    """Return what is wrong with a codebook, a sentence each that says what to do."""
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
    given = [entropy for entropy in (report.entropy_given_left, report.entropy_given_above) if entropy is not None]
    if report.neighbours_are_sampled and min(given) > (1 - LEAST_GAIN) * report.unigram_entropy:
        found.append(
            "a patch's neighbours tell next to nothing about its code, so there is little to learn from context: fit "
            "with a smaller --vocab-size, on larger patches or on a teacher's features."
        )
    return found


def report_table(report: CodebookReport) -> Table:
    """Return the report as a table for the terminal."""
    table = Table(
        title=f"codebook: {report.kind}, {report.vocab_size:,} codes, {report.content_hash[:12]}", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    rows, columns = report.grid
    table.add_row("images", f"{report.images:,}", f"{report.patches:,} patches, {rows} x {columns} an image")
    table.add_row("used codes", f"{report.used_codes:,}", f"{report.usage_share:.1%}; {report.dead_codes:,} dead")
    even = report.perplexity / report.vocab_size
    table.add_row("perplexity", f"{report.perplexity:,.1f}", f"{even:.1%} of all codes in even use")
    table.add_row("most frequent code", f"{report.top_share:.1%}", "of patches: accuracy of guessing it")
    table.add_row("unigram entropy", f"{report.unigram_entropy:.3f} nats", "loss without looking at the image")
    for where, entropy in (("left", report.entropy_given_left), ("above", report.entropy_given_above)):
        if entropy is not None:
            gain = f"{report.unigram_entropy - entropy:.3f} nats told by one neighbour"
            rough = "" if report.neighbours_are_sampled else "; rough"
            table.add_row(f"entropy given {where}", f"{entropy:.3f} nats", gain + rough)
    if report.pair_coverage is not None:
        verdict = "" if report.neighbours_are_sampled else ": too few"
        table.add_row("neighbouring pairs", f"{report.pairs:,}", f"cover {report.pair_coverage:.1%} of all{verdict}")
    table.add_row("mean distance", f"{report.mean_distance:.4g}", "of a patch from its code")
    return table
