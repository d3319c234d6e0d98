import io
import json
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tests.conftest import QUIET
from torch import Tensor

from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.jobs.tokenizer.codebook import (
    ATLAS_PATCHES,
    GAP,
    GROUND,
    HEADER,
    MARGIN,
    CodebookReport,
    cut_patch,
    measure_codebook,
    nearest_patches,
    plot_atlas,
    report_table,
    shortcomings,
    spread_codes,
)
from mapet.jobs.tokenizer.fit import fit_tokenizer
from mapet.tokenizers.kmeans_tokenizers import KPixels


@pytest.fixture(scope="module")
def tokenized() -> tuple[KPixels, Tensor, Tensor]:
    """A tokenizer of every eighth training digit, its ids and its distances."""
    images = open_images("mnist")
    views = torch.stack([images.load(i, Reading(1)) for i in range(0, len(images), 8)]).float() / 255
    tokenizer = KPixels(28, 7, 1, vocab_size=24)
    tokenizer.fit(tokenizer.features(views).flatten(0, 1), seed=0)
    return tokenizer, *tokenizer.encode_with_distance(views)


def test_figures_of_digits_equal_those_counted_in_a_dictionary(tokenized: tuple[KPixels, Tensor, Tensor]) -> None:
    tokenizer, ids, distances = tokenized
    report = measure_codebook(tokenizer, ids, distances)
    counts = Counter(ids.flatten().tolist())
    shares = [count / ids.numel() for count in counts.values()]
    assert (report.images, report.patches, report.kind) == (500, 8000, "pixels")
    assert (report.used_codes, report.dead_codes) == (len(counts), 24 - len(counts))
    assert (report.usage_share, report.top_share) == (len(counts) / 24, max(shares))
    assert report.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert report.perplexity == pytest.approx(math.exp(report.unigram_entropy))
    assert report.mean_distance == pytest.approx(distances.mean().item(), rel=1e-5)
    assert json.loads(json.dumps(asdict(report))) == {**asdict(report), "grid": [4, 4]}


@pytest.mark.parametrize("count", [3, 40])
def test_nearest_patches_are_those_found_by_brute_force(count: int, tokenized: tuple[KPixels, Tensor, Tensor]) -> None:
    """Digits have many patches without ink, which have the same distance."""
    _, ids, distances = tokenized
    distances = distances.round(decimals=2)  # more of them are the same
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
    ],
)
def test_shortcomings(change: dict[str, Any], expected: str | None) -> None:
    found = shortcomings(replace(GOOD, **change))
    assert len(found) == (expected is not None)
    if expected:
        assert re.search(expected, found[0])


def test_report_table_on_a_narrow_terminal() -> None:
    text, report = io.StringIO(), replace(GOOD, patches=1_000_000)
    Console(file=text, width=80).print(report_table(report).to_terminal())
    shown = text.getvalue()
    assert len(shown.splitlines()) == 9, "no line is broken"
    for part in ("0123456789ab", "1,000,000 patches", "50.0%", "7.4", "2.000 nats", "0.25"):
        assert part in shown


@pytest.mark.parametrize(("channels", "side", "shown"), [(1, 7, 42), (3, 16, 48), (3, 32, 64)])
def test_patches_are_in_their_places(channels: int, side: int, shown: int, tmp_path: Path) -> None:
    """Images of one patch: the second alone has code 9, which is rare; from the fourth on all look the same."""
    pixels = torch.randint(256, (4, channels, side, side), generator=torch.Generator().manual_seed(0)).byte()
    ids = torch.cat([torch.tensor([5, 9, 5, 5]), torch.full((20_000,), 5)])[:, None]
    distances = torch.cat([torch.tensor([0.3, 0.0, 0.1, 0.2]), torch.ones(20_000)])[:, None]
    plot_atlas(ids, distances, (1, 1), lambda image: pixels[min(image, 3)] / 255, tmp_path / "atlas.png")
    page, step = np.asarray(Image.open(tmp_path / "atlas.png")), shown + GAP
    expected = np.full((2 * step + GAP, ATLAS_PATCHES * step + GAP, 3), GROUND)
    for row, images in enumerate(([2, 3, 0, *[3] * (ATLAS_PATCHES - 3)], [1])):
        for column, image in enumerate(images):
            patch = pixels[image].expand(3, -1, -1).permute(1, 2, 0).numpy().repeat(shown // side, 0)
            top, left = GAP + row * step, GAP + column * step
            expected[top : top + shown, left : left + shown] = patch.repeat(shown // side, 1)
    assert np.array_equal(page[HEADER:, MARGIN:], expected)
    for label in np.split(page[HEADER + GAP :, :MARGIN], 2):
        assert (label < 128).any(), "each row is labelled"
        assert (label[:, 0] == 255).all(), "no label is cut off"


def test_cut_patch() -> None:
    view = torch.rand(3, 64, 128, generator=torch.Generator().manual_seed(0))
    expected = view[:, :, 64:].unflatten(2, (32, 2)).unflatten(1, (32, 2)).mean(dim=(2, 4))
    assert torch.allclose(cut_patch(view, (1, 2), 1) / 255, expected, atol=1 / 255)
    assert torch.equal(cut_patch(view, (4, 4), 6), (view[:, 16:32, 64:96] * 255).round().byte())
    # Patches of 28 x 27 pixels do not tile 3 x 3.
    assert cut_patch(view[:, :28, :27], (3, 3), 8).shape == (3, 10, 9)


def test_files_of_a_report(digits: Path, tmp_path: Path) -> None:
    values = {"data": str(digits), "image_size": 28, "patch_size": 7, "channels": 1, "vocab_size": 24, "workers": 0}
    _, report = fit_tokenizer(values, tmp_path / "tok", console=QUIET)
    assert report is not None
    assert json.loads((tmp_path / "tok" / "report.json").read_text()) == {**asdict(report), "grid": [4, 4]}
    for name in ("atlas.png", "token_maps.png", "usage.png"):
        pixels = np.asarray(Image.open(tmp_path / "tok" / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 150
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
