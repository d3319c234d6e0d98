import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mapet.jobs.tokenizer.atlas import GAP, GROUND, HEADER, MARGIN, AtlasRow, cut_patch, plot_atlas
from mapet.jobs.tokenizer.fit import fit_tokenizer


def picture(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 150
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    return pixels


@pytest.mark.parametrize(("channels", "side", "shown"), [(1, 7, 42), (3, 32, 64), (3, 40, 40)])
def test_patches_are_in_their_places(channels: int, side: int, shown: int, tmp_path: Path) -> None:
    pixels = torch.randint(256, (4, channels, side, side), generator=torch.Generator().manual_seed(0)).byte()
    plot_atlas([AtlasRow(5, 0.75, list(pixels[:3])), AtlasRow(9, 0.00001, [pixels[3]])], 3, tmp_path / "atlas.png")
    page, step = np.asarray(Image.open(tmp_path / "atlas.png")), shown + GAP
    expected = np.full((2 * step + GAP, 3 * step + GAP, 3), GROUND)
    for number, (row, column) in enumerate(((0, 0), (0, 1), (0, 2), (1, 0))):
        patch = pixels[number].expand(3, -1, -1).permute(1, 2, 0).numpy().repeat(shown // side, 0)
        top, left = GAP + row * step, GAP + column * step
        expected[top : top + shown, left : left + shown] = patch.repeat(shown // side, 1)
    assert np.array_equal(page[HEADER:, MARGIN:], expected)
    for row in np.split(page[HEADER + GAP :, :MARGIN], 2):
        assert (row < 128).any(), "each row is labelled"
        assert (row[:, 0] == 255).all(), "no label is cut off"


def test_cut_patch() -> None:
    view = torch.rand(3, 64, 128, generator=torch.Generator().manual_seed(0))
    expected = view[:, :, 64:].unflatten(2, (32, 2)).unflatten(1, (32, 2)).mean(dim=(2, 4))
    assert torch.allclose(cut_patch(view, (1, 2), 1) / 255, expected, atol=1 / 255)
    assert torch.equal(cut_patch(view, (4, 4), 6), (view[:, 16:32, 64:96] * 255).round().byte())
    # Patches of 28 x 27 pixels do not tile 3 x 3.
    assert cut_patch(view[:, :28, :27], (3, 3), 8).shape == (3, 10, 9)


def test_files_of_a_report(digits: Path, tmp_path: Path) -> None:
    values = {"data": str(digits), "image_size": 28, "patch_size": 7, "channels": 1, "vocab_size": 24, "workers": 0}
    _, report = fit_tokenizer(values, tmp_path / "tok", console=Console(quiet=True))
    assert report is not None
    assert json.loads((tmp_path / "tok" / "report.json").read_text()) == {**asdict(report), "grid": [4, 4]}
    for name in ("atlas.png", "token_maps.png", "usage.png"):
        picture(tmp_path / "tok" / name)
