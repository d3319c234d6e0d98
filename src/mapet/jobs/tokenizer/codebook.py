"""Statistics of a codebook: use of its ids, entropies given neighbours, patches nearest to its codes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mapet.report.tables import Table
from mapet.tokenizers.base import Grid, Tokenizer

LEAST_PATCHES_PER_CODE = 10  # with fewer patches, a rare code may look like a dead one
LEAST_COVERAGE = 0.9  # of neighbouring pairs; above, their entropy was within 0.2 nats of the truth in simulations
LEAST_GAIN = 0.05  # share of the unigram entropy


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
        entropy_given_left, entropy_given_above: conditional entropy of an id given the id of the patch to its left or
            above it: ``chao_shen`` of the pairs minus ``chao_shen`` of the given ids, at most the unigram entropy; None
            if the grid has no such pair. The difference to the unigram entropy is the information in one neighbour.
        pairs: number of pairs of neighbours, in both directions together.
        pair_coverage: probability that a further pair is one of those in the sample, estimated as 1 minus the share of
            pairs that occur once (Good, "The population frequencies of species and the estimation of population
            parameters", 1953), in the direction where it is lower; None without pairs. If it is low, the conditional
            entropies are rough.
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
    entropy_given_left: float | None
    entropy_given_above: float | None
    pairs: int
    pair_coverage: float | None
    mean_distance: float

    def __repr__(self) -> str:
        return (
            f"<CodebookReport: {self.used_codes} of {self.vocab_size} codes used by {self.patches} patches, unigram "
            f"entropy {self.unigram_entropy:.3f} nats, perplexity {self.perplexity:.1f}>"
        )

    @property
    def is_covered(self) -> bool:
        """Whether the sample has enough pairs of neighbours to estimate the conditional entropies."""
        return self.pair_coverage is not None and self.pair_coverage >= LEAST_COVERAGE


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
    maps = ids.reshape(-1, *tokenizer.grid)
    directions = [(maps[:, :, :-1], maps[:, :, 1:]), (maps[:, :-1], maps[:, 1:])]
    left, above = (_conditional_entropy(given, those, vocab_size) for given, those in directions)
    coverages = [found[1] for found in (left, above) if found]
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
        entropy_given_left=min(left[0], entropy) if left else None,
        entropy_given_above=min(above[0], entropy) if above else None,
        pairs=sum(given.numel() for given, _ in directions),
        pair_coverage=min(coverages, default=None),
        mean_distance=float(total_distance) / patches,
    )


def _conditional_entropy(given: Tensor, ids: Tensor, vocab_size: int) -> tuple[float, float] | None:
    """Return the entropy of ids given their neighbours, and the coverage of the pairs; None without pairs."""
    if not ids.numel():
        return None
    pairs = torch.unique((given.long() * vocab_size + ids).flatten(), return_counts=True)[1]
    entropy = chao_shen(pairs) - chao_shen(torch.bincount(given.flatten()))
    return entropy, 1 - int((pairs == 1).sum()) / ids.numel()


def chao_shen(counts: Tensor) -> float:
    """Estimate the entropy, in nats, of the distribution that a sample was drawn from.

    The entropy of the sample's own frequencies is far too low if there are nearly as many kinds as draws, as for pairs
    of ids, and the correction of Miller and Madow adds at most half a nat: for 400,000 pairs of independent, equally
    frequent ids out of 8192, the conditional entropy is 9.0 nats, but the frequencies give 3.9 and the correction 4.4.
    This estimator gives 9.1. It scales frequencies by the coverage of the sample, and weights each kind by the inverse
    of its probability to be in the sample. If ids depend on each other and the coverage is low, it is still too low.

    Source: Chao & Shen, "Nonparametric estimation of Shannon's index of diversity when there are unseen species in
    sample" (2003). If each kind occurs once, one kind is counted as if it occurred twice, as in the R package entropy.

    Args:
        counts: how often each kind occurs in the sample.
    """
    counts = counts[counts > 0].double()
    size = counts.sum()
    once = min(int((counts == 1).sum()), int(size) - 1)
    share = (1 - once / size) * counts / size
    seen = -torch.expm1(size * torch.log1p(-share))
    return float((torch.special.entr(share) / seen).sum())


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
    given = [entropy for entropy in (report.entropy_given_left, report.entropy_given_above) if entropy is not None]
    if report.is_covered and min(given) > (1 - LEAST_GAIN) * report.unigram_entropy:
        found.append(
            "a patch's neighbours tell next to nothing about its code, so there is little to learn from context: fit "
            "with a smaller --vocab-size, on larger patches or on a teacher's features."
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
    ]
    for where, entropy in (("left", report.entropy_given_left), ("above", report.entropy_given_above)):
        if entropy is not None:
            gain = f"{report.unigram_entropy - entropy:.3f} nats from one neighbour"
            lines.append([f"entropy given {where}", f"{entropy:.3f} nats", gain + "; rough" * (not report.is_covered)])
    if report.pair_coverage is not None:
        covered = f"cover {report.pair_coverage:.1%} of all" + ": too few" * (not report.is_covered)
        lines.append(["neighbouring pairs", f"{report.pairs:,}", covered])
    lines.append(["mean distance", f"{report.mean_distance:.4g}", "between a patch and its code"])
    title = f"codebook: {report.kind}, {report.vocab_size:,} codes, {report.content_hash[:12]}"
    return Table(["", "", ""], lines, title)
