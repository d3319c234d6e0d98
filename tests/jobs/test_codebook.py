from __future__ import annotations

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

from mapet import MapetError
from mapet.data.open import open_images
from mapet.jobs.tokenizer import codebook
from mapet.jobs.tokenizer.codebook import CodebookReport, CodebookStatistics, chao_shen, report_table, shortcomings
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.kpixels import KPixels


class Given(Tokenizer):
    """Stands for any tokenizer where a test makes up the ids."""

    kind = "given"

    def __init__(self, rows: int, columns: int, vocab_size: int) -> None:
        super().__init__((rows, columns), vocab_size, 4 * rows, channels=1)

    @property
    def config(self) -> dict[str, Any]:
        return {"rows": self.grid[0], "columns": self.grid[1], "vocab_size": self.vocab_size}


def report_of(ids: Tensor, vocab_size: int) -> CodebookReport:
    """Report on ``(B, rows, columns)`` ids of black images."""
    count, rows, columns = ids.shape
    statistics = CodebookStatistics(Given(rows, columns, vocab_size), atlas_patches=2)
    statistics.add(torch.zeros(count, 1, rows, columns), ids.flatten(1), torch.ones(count, rows * columns))
    return statistics.report()


def drawn(shape: tuple[int, ...], vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def views() -> Tensor:
    """Every eighth training digit, so that all classes are there."""
    images = open_images("mnist")
    return torch.stack([images.load(i, 1) for i in range(0, len(images), 8)]).float() / 255


@pytest.fixture(scope="module")
def tokenizer(views: Tensor) -> KPixels:
    tokenizer = KPixels(28, 7, 1, vocab_size=24)
    return tokenizer.fit(tokenizer.features(views).flatten(0, 1), seed=0)


def gathered(tokenizer: KPixels, views: Tensor, batch_size: int, **options: int) -> CodebookStatistics:
    statistics = CodebookStatistics(tokenizer, **options)
    ids, distances = tokenizer.encode_with_distance(views)  # at once: distances round differently in other batches
    for batch in zip(views.split(batch_size), ids.split(batch_size), distances.split(batch_size), strict=True):
        statistics.add(*batch)
    return statistics


def plain_chao_shen(counts: Counter[Any]) -> float:
    size = sum(counts.values())
    coverage = 1 - sum(count == 1 for count in counts.values()) / size
    shares = [coverage * count / size for count in counts.values()]
    return -sum(share * math.log(share) / (1 - (1 - share) ** size) for share in shares)


def test_real_digits_against_counting_in_dictionaries(tokenizer: KPixels, views: Tensor) -> None:
    report = gathered(tokenizer, views, 64).report()
    ids, distances = tokenizer.encode_with_distance(views)
    maps = ids.reshape(-1, 4, 4).tolist()
    single = Counter(ids.flatten().tolist())
    shares = [count / ids.numel() for count in single.values()]
    assert report.images == len(views) == 500
    assert report.patches == 8000
    assert report.used_codes == len(single)
    assert report.dead_codes == 24 - len(single)
    assert report.usage_share == len(single) / 24
    assert report.top_share == max(shares)
    assert report.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares))
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
    assert report.kind == "pixels"
    assert report.content_hash == tokenizer.content_hash
    assert CodebookReport(**json.loads(json.dumps(asdict(report)))) == replace(report, grid=[4, 4])  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_how_images_are_batched_makes_no_difference(
    batch_size: int, tokenizer: KPixels, views: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codebook, "MOST_PAIR_PATCHES", 130 * 16 + 3)
    whole, parts = gathered(tokenizer, views, len(views)), gathered(tokenizer, views, batch_size)
    assert parts.report() == whole.report()
    for name, found in vars(parts.atlas()).items():
        assert torch.equal(found, getattr(whole.atlas(), name)), name


def test_the_mean_distance_does_not_round_differently_in_other_batches() -> None:
    distances = torch.logspace(-20, 20, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    means = []
    for batch_size in (1, 7, 50):
        statistics = CodebookStatistics(Given(2, 3, 1))
        for batch in distances.reshape(50, 6).split(batch_size):
            statistics.add(torch.zeros(len(batch), 1, 2, 3), torch.zeros(len(batch), 6, dtype=torch.long), batch)
        means.append(statistics.report().mean_distance)
    assert means[0] == means[1] == means[2] == pytest.approx(distances.double().mean().item())


def test_neighbours_are_counted_in_the_first_images_only(
    tokenizer: KPixels, views: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gathered(tokenizer, views[:130], 64).report()
    monkeypatch.setattr(codebook, "MOST_PAIR_PATCHES", 130 * 16 + 3)
    report = gathered(tokenizer, views, 64).report()
    assert report.patches == 8000
    assert report.pairs == expected.pairs == 130 * 24
    assert report.entropy_given_left == expected.entropy_given_left


@pytest.mark.parametrize("codes", [1, 5, 32])
def test_perplexity_of_equally_frequent_codes_is_their_number(codes: int) -> None:
    report = report_of(torch.arange(codes * 16).remainder(codes).reshape(-1, 4, 4), vocab_size=64)
    assert report.perplexity == pytest.approx(codes)
    assert (report.used_codes, report.dead_codes, report.usage_share) == (codes, 64 - codes, codes / 64)
    assert report.top_share == 1 / codes


@pytest.mark.parametrize(("images", "vocab_size"), [(2000, 16), (100, 512), (400, 2048)])
def test_a_neighbour_of_independent_ids_tells_nothing(images: int, vocab_size: int) -> None:
    """Even from fewer pairs than there are different ones, where plain counting finds half the entropy or less."""
    report = report_of(drawn((images, 14, 14), vocab_size), vocab_size)
    assert report.unigram_entropy == pytest.approx(math.log(vocab_size), abs=0.02)
    for entropy in (report.entropy_given_left, report.entropy_given_above):
        assert entropy == pytest.approx(report.unigram_entropy, abs=0.1)
        assert entropy <= report.unigram_entropy


def test_a_neighbour_on_a_checkerboard_tells_all() -> None:
    board = torch.arange(4)[:, None] + torch.arange(6)
    report = report_of(torch.stack([board % 2, (board + 1) % 2]), vocab_size=2)
    assert report.unigram_entropy == pytest.approx(math.log(2))
    assert report.entropy_given_left == pytest.approx(0, abs=1e-3)
    assert report.entropy_given_above == pytest.approx(0, abs=1e-3)
    assert report.pair_coverage == 1


@pytest.mark.parametrize("vocab_size", [7, 8, 11, 13, 64])
def test_directions_are_told_apart(vocab_size: int) -> None:
    """Each row is a cycle through the ids, beginning anywhere."""
    cycles = (drawn((500, 12, 1), vocab_size) + torch.arange(12)) % vocab_size
    report = report_of(cycles, vocab_size)
    assert report.entropy_given_left == pytest.approx(0, abs=1e-3)
    assert report.entropy_given_left >= 0
    assert report.entropy_given_above == pytest.approx(math.log(vocab_size), abs=0.1)


def test_a_grid_of_one_row_has_no_neighbours_above() -> None:
    report = report_of(drawn((50, 1, 6), 4), vocab_size=4)
    assert report.entropy_given_above is None
    assert report.entropy_given_left is not None
    assert report.pairs == 250
    alone = report_of(drawn((50, 1, 1), 4), vocab_size=4)
    assert (alone.entropy_given_left, alone.entropy_given_above, alone.pair_coverage) == (None, None, None)
    assert shortcomings(alone) == []
    report_table(alone)


def test_entropy_of_what_was_seen_once_is_finite() -> None:
    assert chao_shen(torch.tensor([1])) == 0
    assert 0 < chao_shen(torch.ones(20, dtype=torch.long)) < math.inf
    assert chao_shen(torch.tensor([3, 0, 5])) == chao_shen(torch.tensor([3, 5]))


@pytest.mark.parametrize("count", [3, 40])
def test_kept_patches_are_the_nearest_of_each_code_one_an_image(count: int, tokenizer: KPixels, views: Tensor) -> None:
    """By brute force; real digits have many patches without ink, which are equally near."""
    atlas = gathered(tokenizer, views, 50, atlas_codes=24, atlas_patches=count).atlas()
    ids, distances = tokenizer.encode_with_distance(views)
    assert len(atlas.codes) == len(ids.unique())
    ties = 0
    for row, code in enumerate(atlas.codes.tolist()):
        best = {}
        for image, cell in (ids == code).nonzero().tolist():
            candidate = (distances[image, cell].item(), image, cell)
            best[image] = min(best.get(image, candidate), candidate)
        expected = sorted(best.values())[:count]
        ties += len({distance for distance, _, _ in expected}) < len(expected)
        present = atlas.distances[row].isfinite()
        assert present.sum() == len(expected)
        assert atlas.distances[row][present].tolist() == [distance for distance, _, _ in expected]
        assert atlas.images[row][present].tolist() == [image for _, image, _ in expected]
        for pixels, (_, image, cell) in zip(atlas.pixels[row], expected, strict=False):
            top, left = 7 * (cell // 4), 7 * (cell % 4)
            patch = views[image, :, top : top + 7, left : left + 7]
            assert torch.equal(pixels, (patch * 255).round().byte())
    assert ties


def test_shown_codes_are_spread_over_the_ranking(tokenizer: KPixels, views: Tensor) -> None:
    statistics = gathered(tokenizer, views, 64, atlas_codes=5)
    atlas = statistics.atlas()
    ranked = statistics.counts[statistics.counts > 0].sort(descending=True).values
    counts = statistics.counts[atlas.codes]
    steps = (len(ranked) - 1) / 4
    assert counts.tolist() == [ranked[round(i * steps)].item() for i in range(5)]
    assert torch.equal(atlas.shares, counts / statistics.counts.sum())


def test_large_patches_are_kept_small() -> None:
    statistics = CodebookStatistics(Given(1, 2, 2), atlas_patches=1)
    views = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    statistics.add(views, torch.tensor([[0, 1]]), torch.ones(1, 2))
    pixels = statistics.atlas().pixels
    assert pixels.shape == (2, 1, 3, 32, 32)
    expected = views[0, :, :, 64:].unflatten(2, (32, 2)).unflatten(1, (32, 2)).mean(dim=(2, 4))
    assert torch.allclose(pixels[1, 0] / 255, expected, atol=1 / 255)


def test_what_cannot_be_reported_is_refused() -> None:
    statistics = CodebookStatistics(Given(3, 3, 4))
    with pytest.raises(MapetError, match="at least one image"):
        statistics.report()
    with pytest.raises(MapetError, match="at least one image"):
        statistics.atlas()


def test_views_that_patches_do_not_tile_are_enlarged() -> None:
    """A teacher may see views of a size that has nothing to do with the student's grid."""
    statistics = CodebookStatistics(Given(3, 3, 4))
    statistics.add(torch.full((1, 1, 28, 27), 0.5), torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9))
    assert statistics.atlas().pixels.shape[-2:] == (10, 9)
    assert statistics.report().patches == 9


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
def test_warnings(change: dict[str, Any], expected: str | None) -> None:
    found = shortcomings(replace(GOOD, **change))
    assert len(found) == (expected is not None)
    if expected:
        assert re.search(expected, found[0])


@pytest.mark.parametrize("coverage", [0.9, 0.89])
def test_the_table_says_it_all_on_a_narrow_terminal(coverage: float) -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(report_table(replace(GOOD, patches=1_000_000, pair_coverage=coverage)))
    lines = text.getvalue().splitlines()
    assert len(lines) == 12, "no line is broken"
    shown = text.getvalue()
    for part in (
        "pixels",
        "0123456789ab",
        "1,000,000 patches",
        "10 x 10",
        "50.0%",
        "7.4",
        "2.000 nats",
        "0.100 nats",
        "1,800",
        "0.25",
    ):
        assert part in shown
    assert ("rough" in shown) == ("too few" in shown) == (coverage < 0.9)
