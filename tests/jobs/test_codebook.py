import io
import json
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from mapet.data.open import open_images
from mapet.jobs.tokenizer.codebook import (
    CodebookReport,
    chao_shen,
    measure_codebook,
    nearest_patches,
    report_table,
    shortcomings,
    spread_codes,
)
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.kpixels import KPixels


class Given(Tokenizer):
    """Stands for any tokenizer where a test makes up the ids."""

    kind = "given"

    def __init__(self, rows: int, columns: int, vocab_size: int) -> None:
        super().__init__((rows, columns), vocab_size, 4 * rows, channels=1)
        self.config = {"rows": rows, "columns": columns, "vocab_size": vocab_size}


def report_of(ids: Tensor, vocab_size: int) -> CodebookReport:
    """Report on ``(B, rows, columns)`` ids."""
    return measure_codebook(Given(*ids.shape[1:], vocab_size), ids.flatten(1), torch.ones(ids.flatten(1).shape))


def drawn(shape: tuple[int, ...], vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenized() -> tuple[KPixels, Tensor, Tensor]:
    """A tokenizer of every eighth training digit, its ids and its distances."""
    images = open_images("mnist")
    views = torch.stack([images.load(i, 1) for i in range(0, len(images), 8)]).float() / 255
    tokenizer = KPixels(28, 7, 1, vocab_size=24)
    tokenizer.fit(tokenizer.features(views).flatten(0, 1), seed=0)
    return tokenizer, *tokenizer.encode_with_distance(views)


def plain_chao_shen(counts: Counter[Any]) -> float:
    size = sum(counts.values())
    coverage = 1 - sum(count == 1 for count in counts.values()) / size
    shares = [coverage * count / size for count in counts.values()]
    return -sum(share * math.log(share) / (1 - (1 - share) ** size) for share in shares)


def test_figures_of_digits_equal_those_counted_in_dictionaries(tokenized: tuple[KPixels, Tensor, Tensor]) -> None:
    tokenizer, ids, distances = tokenized
    report = measure_codebook(tokenizer, ids, distances)
    maps, single = ids.reshape(-1, 4, 4).tolist(), Counter(ids.flatten().tolist())
    shares = [count / ids.numel() for count in single.values()]
    assert (report.images, report.patches, report.kind) == (500, 8000, "pixels")
    assert (report.used_codes, report.dead_codes) == (len(single), 24 - len(single))
    assert (report.usage_share, report.top_share) == (len(single) / 24, max(shares))
    assert report.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert report.perplexity == pytest.approx(math.exp(report.unigram_entropy))
    assert report.mean_distance == pytest.approx(distances.mean().item(), rel=1e-5)
    left = [(row[i], row[i + 1]) for image in maps for row in image for i in range(3)]
    above = [(image[i][j], image[i + 1][j]) for image in maps for i in range(3) for j in range(4)]
    for pairs, found in ((left, report.entropy_given_left), (above, report.entropy_given_above)):
        expected = plain_chao_shen(Counter(pairs)) - plain_chao_shen(Counter(given for given, _ in pairs))
        assert found == pytest.approx(expected)
        assert 0 < expected < report.unigram_entropy
    assert report.pairs == len(left) + len(above)
    seen_once = [sum(count == 1 for count in Counter(pairs).values()) for pairs in (left, above)]
    assert report.pair_coverage == pytest.approx(1 - max(seen_once) / len(left))
    assert json.loads(json.dumps(asdict(report))) == {**asdict(report), "grid": [4, 4]}
    assert repr(report).startswith(f"<CodebookReport: {len(single)} of 24 codes used by 8000 patches, unigram entropy")


@pytest.mark.parametrize(("images", "vocab_size"), [(2000, 16), (100, 512), (400, 2048)])
def test_neighbours_of_independent_ids_are_uninformative(images: int, vocab_size: int) -> None:
    """Even with fewer pairs than there are kinds of pairs, where the frequencies give half the entropy or less."""
    report = report_of(drawn((images, 14, 14), vocab_size), vocab_size)
    assert report.unigram_entropy == pytest.approx(math.log(vocab_size), abs=0.02)
    for entropy in (report.entropy_given_left, report.entropy_given_above):
        assert entropy == pytest.approx(report.unigram_entropy, abs=0.1)
        assert entropy <= report.unigram_entropy


@pytest.mark.parametrize("vocab_size", [2, 7, 64])
def test_directions_are_measured_apart(vocab_size: int) -> None:
    """Each row counts through the ids, from a random id on."""
    report = report_of((drawn((500, 12, 1), vocab_size) + torch.arange(12)) % vocab_size, vocab_size)
    assert report.entropy_given_left == pytest.approx(0, abs=1e-3)
    assert report.entropy_given_above == pytest.approx(math.log(vocab_size), abs=0.1)


def test_grids_without_neighbours() -> None:
    row = report_of(drawn((50, 1, 6), 4), vocab_size=4)
    assert row.entropy_given_above is None
    assert row.entropy_given_left is not None
    assert row.pairs == 250
    alone = report_of(drawn((50, 1, 1), 4), vocab_size=4)
    assert (alone.entropy_given_left, alone.entropy_given_above, alone.pair_coverage) == (None, None, None)
    assert shortcomings(alone) == []
    report_table(alone)
    assert chao_shen(torch.tensor([1])) == 0
    assert 0 < chao_shen(torch.ones(20, dtype=torch.long)) < math.inf


@pytest.mark.parametrize("count", [3, 40])
def test_nearest_patches_are_those_found_by_brute_force(count: int, tokenized: tuple[KPixels, Tensor, Tensor]) -> None:
    """Digits have many patches without ink, which have the same distance."""
    _, ids, distances = tokenized
    ties = 0
    for code in ids.unique().tolist():
        best: dict[int, tuple[float, int, int]] = {}
        for image, patch in (ids == code).nonzero().tolist():
            candidate = (distances[image, patch].item(), image, patch)
            best[image] = min(best.get(image, candidate), candidate)
        expected = sorted(best.values())[:count]
        ties += len({distance for distance, _, _ in expected}) < len(expected)
        assert nearest_patches(ids, distances, code, count) == [(image, patch) for _, image, patch in expected]
    assert ties


def test_shown_codes_are_spread_over_the_ranking() -> None:
    counts = torch.tensor([0, 5, 9, 7, 1, 3, 0])
    assert spread_codes(counts, 3) == [2, 1, 4]
    assert spread_codes(counts, 9) == [2, 3, 1, 5, 4]


GOOD = CodebookReport(
    kind="pixels",
    content_hash="0123456789abcdef",
    vocab_size=100,
    grid=(10, 10),
    images=10,
    patches=1000,
    used_codes=50,
    dead_codes=50,
    usage_share=0.5,
    unigram_entropy=2.0,
    perplexity=math.exp(2.0),
    top_share=0.5,
    entropy_given_left=2.0,
    entropy_given_above=1.9,
    pairs=1800,
    pair_coverage=0.9,
    mean_distance=0.25,
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"used_codes": 49, "usage_share": 0.49}, r"only 49 of 100 codes are used.*smaller --vocab-size"),
        ({"patches": 999, "used_codes": 49, "usage_share": 0.49}, r"999 patches are too few.*at least 10 "),
        ({"top_share": 0.51}, r"one code has 51% of all patches.*teacher's features, or --no-contrast"),
        ({"top_share": 0.51, "kind": "features"}, r"one code has 51% of all patches.*teacher's features\.$"),
        ({"entropy_given_above": 1.91}, r"neighbours tell next to nothing"),
        ({"entropy_given_above": 1.91, "pair_coverage": 0.89}, None),
        ({"entropy_given_above": None}, r"neighbours tell next to nothing"),
        ({"unigram_entropy": 0.0, "entropy_given_left": 0.0, "entropy_given_above": 0.0}, None),
    ],
)
def test_shortcomings(change: dict[str, Any], expected: str | None) -> None:
    found = shortcomings(replace(GOOD, **change))
    assert len(found) == (expected is not None)
    if expected:
        assert re.search(expected, found[0])


@pytest.mark.parametrize("coverage", [0.9, 0.89])
def test_report_table_on_a_narrow_terminal(coverage: float) -> None:
    text, report = io.StringIO(), replace(GOOD, patches=1_000_000, pair_coverage=coverage)
    Console(file=text, width=80).print(report_table(report).to_terminal())
    shown = text.getvalue()
    assert len(shown.splitlines()) == 12, "no line is broken"
    for part in ("0123456789ab", "1,000,000 patches", "50.0%", "7.4", "2.000 nats", "0.100 nats", "1,800", "0.25"):
        assert part in shown
    assert ("rough" in shown) == ("too few" in shown) == (coverage < 0.9)
