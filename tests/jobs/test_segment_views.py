from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mapet.data.seeds import Draw
from mapet.jobs.segment.views import MaskedCrop, MaskedWhole, scaled_size

PLAIN = (0.0,), (1.0,)


def ramp(rows: int, columns: int) -> Tensor:
    """An image whose brightness, and whose mask, tell the column: what is done to one must be done to the other."""
    column = torch.arange(columns).float().expand(rows, columns)
    return torch.stack([column / 255, column])


@pytest.mark.parametrize("short_side", [None, 32, 48])
def test_image_and_mask_are_cropped_and_flipped_alike(short_side: int | None) -> None:
    crop = MaskedCrop((32, 32), short_side, 0.2, 0.5, *PLAIN, interpolation="bilinear")
    directions = set()
    for number in range(12):
        ids, image = crop(ramp(80, 120), Draw(number, 0))
        assert ids.shape == (32, 32)
        assert ids.dtype == torch.long
        difference = (image[0] * 255 - ids)[:, 2:-2].abs().max()
        assert difference <= 2.5, "a crop enlarges less than the ramp rises in two pixels and a half"
        directions.add(bool(ids[0, -1] > ids[0, 0]))
    assert directions == {True, False}


def test_a_crop_is_its_draws_alone() -> None:
    crop = MaskedCrop((28, 28), 28, 0.2, 0.5, *PLAIN)
    before = torch.random.get_rng_state()
    first, again, other = (crop(ramp(60, 60), Draw(seed, 0)) for seed in (1, 1, 2))
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_crops_show_no_more_than_a_window_does() -> None:
    """Windows of 32 pixels on an image resized to 96 x 144 show 1 in 13.5 of it."""
    crop = MaskedCrop((32, 32), 96, 1.0, 0.0, *PLAIN)
    shown = [(ids[0, -1] - ids[0, 0]).item() for ids in (crop(ramp(192, 288), Draw(n, 0))[0] for n in range(20))]
    assert 45 < sum(shown) / len(shown) < 80, "about 64 of 288 columns"


def test_images_are_normalised_and_masks_are_not() -> None:
    _, image = MaskedWhole((28, 28), 28, (0.2,), (0.5,))(
        torch.cat([torch.full((1, 30, 40), 0.7), torch.ones(1, 30, 40)])
    )
    assert torch.allclose(image, torch.tensor(1.0))
    assert image.shape == (1, 28, 37)


def test_the_mask_stays_as_large_as_it_is() -> None:
    stacked = ramp(50, 90)
    ids, image = MaskedWhole((28, 28), None, *PLAIN)(stacked)
    assert image.shape == (1, 28, 28)
    assert torch.equal(ids, stacked[1].long())


@pytest.mark.parametrize(
    ("size", "window", "short_side", "expected"),
    [
        ((100, 200), (28, 28), 28, (28, 56)),
        ((200, 100), (28, 28), 56, (112, 56)),
        ((10, 10), (28, 28), 28, (28, 28)),
        ((100, 200), (28, 84), 28, (42, 84)),
        ((100, 200), (28, 28), 7, (28, 56)),
    ],
)
def test_no_side_becomes_smaller_than_a_window(
    size: tuple[int, int], window: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    assert scaled_size(size, window, short_side) == expected
