from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mapet.data.open import open_images
from mapet.jobs.tokenizer.atlas import GAP, GROUND, atlas_array, plot_usage, write_codebook_report
from mapet.jobs.tokenizer.codebook import Atlas, CodebookReport, CodebookStatistics
from mapet.tokenizers.kpixels import KPixels


def colours(path: Path) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 150
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


@pytest.mark.parametrize(("channels", "side", "shown"), [(1, 7, 42), (3, 32, 64), (3, 40, 40)])
def test_each_patch_is_in_its_place(channels: int, side: int, shown: int) -> None:
    pixels = torch.randint(256, (2, 3, channels, side, side), generator=torch.Generator().manual_seed(0)).byte()
    distances = torch.tensor([[0.0, 1.0, 2.0], [0.5, torch.inf, torch.inf]])
    atlas = Atlas(torch.tensor([5, 9]), torch.tensor([0.75, 0.25]), distances, torch.zeros(2, 3), pixels)
    picture = atlas_array(atlas)
    step = shown + GAP
    assert picture.shape == (2 * step + GAP, 3 * step + GAP, 3)
    assert picture.dtype == np.uint8
    rebuilt = np.full_like(picture, GROUND)
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0)):
        top, left = GAP + row * step, GAP + column * step
        patch = Image.fromarray(pixels[row, column].expand(3, -1, -1).permute(1, 2, 0).numpy())
        rebuilt[top : top + shown, left : left + shown] = patch.resize((shown, shown), Image.Resampling.NEAREST)
    assert np.array_equal(picture, rebuilt)


def test_files_of_a_report_on_real_digits(tmp_path: Path) -> None:
    images = open_images("mnist")
    views = torch.stack([images.load(i, 1) for i in range(0, len(images), 20)]).float() / 255
    tokenizer = KPixels(28, 7, 1, vocab_size=24)
    tokenizer.fit(tokenizer.features(views).flatten(0, 1), seed=0)
    ids, distances = tokenizer.encode_with_distance(views)
    statistics = CodebookStatistics(tokenizer, atlas_codes=8, atlas_patches=6)
    statistics.add(views, ids, distances)

    report = statistics.report()
    write_codebook_report(report, statistics, views[:4], ids[:4], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "atlas.png",
        "report.json",
        "token_maps.png",
        "usage.png",
    ]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert CodebookReport(**{**saved, "grid": tuple(saved["grid"])}) == report
    assert saved == {**asdict(report), "grid": [4, 4]}

    patches = atlas_array(statistics.atlas())
    page = np.asarray(Image.open(tmp_path / "atlas.png"))
    assert np.array_equal(page[-patches.shape[0] :, -patches.shape[1] :], patches)
    margin = page[-patches.shape[0] :, : -patches.shape[1]]
    rows = np.array_split(margin, 8)
    assert all((row < 128).any() for row in rows), "each row is labelled"
    assert (margin[:, 0] == 255).all(), "nothing is cut off"
    assert colours(tmp_path / "token_maps.png") > 20
    assert colours(tmp_path / "usage.png") > 20


def test_usage_of_few_and_of_many_codes(tmp_path: Path) -> None:
    for name, counts in (("one", [0, 7, 0]), ("many", list(range(8192)))):
        plot_usage(torch.tensor(counts), tmp_path / f"{name}.png")
        assert colours(tmp_path / f"{name}.png") > 20
