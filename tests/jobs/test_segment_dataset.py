from typing import Any

import pytest
import torch
from torch import Tensor

from mapet.data.views import PlainView
from mapet.jobs.segment.config import SegmentConfig
from mapet.jobs.segment.dataset import MaskedViews


def views(size: tuple[int, int] = (32, 32), **changes: Any) -> MaskedViews:
    plain = PlainView(size, (0.2,), (0.5,), interpolation="bilinear")
    return MaskedViews(plain, SegmentConfig(model="unused", data="unused", **changes))


def ramp(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return an image and class ids that both tell the column."""
    ids = torch.arange(columns).expand(rows, columns)
    return ids[None] / 255, ids


@pytest.mark.parametrize("changes", [{"mode": "whole"}, {"short_side": 32}, {"short_side": 48}])
def test_image_and_mask_are_cropped_and_flipped_alike(changes: dict[str, Any]) -> None:
    flipped = set()
    for seed in range(12):
        image, ids = views(**changes).random_crop(*ramp(80, 120), seed)
        assert ids.shape == (32, 32)
        assert ids.dtype == torch.long
        columns = (image[0] * 0.5 + 0.2) * 255
        assert (columns - ids)[:, 2:-2].abs().max() <= 2.5, "about the width of one pixel of the crop"
        flipped.add(bool(ids[0, -1] < ids[0, 0]))
    assert flipped == {True, False}


def test_crops_show_no_more_than_a_window_does() -> None:
    """Windows of 32 pixels on an image resized to 96 x 144 show 1 in 13.5 of it: about 64 of 288 columns."""
    crops = [views(short_side=96, crop_min=1, flip=0).random_crop(*ramp(192, 288), seed)[1] for seed in range(20)]
    assert 45 < sum(float(ids[0, -1] - ids[0, 0]) for ids in crops) / 20 < 80


def test_whole_images_are_normalised_and_masks_keep_their_resolution() -> None:
    ids = torch.ones(30, 40, dtype=torch.long)
    image, same = views((28, 28)).whole_image(torch.full((1, 30, 40), 0.7), ids, 0)
    assert torch.allclose(image, torch.tensor(1.0))
    assert image.shape == (1, 28, 37)
    assert torch.equal(same, ids)
    assert views((28, 28), mode="whole").whole_image(*ramp(50, 90), 0)[0].shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("size", "window", "short_side", "expected"),
    [((200, 100), (28, 28), 56, (112, 56)), ((100, 200), (28, 84), 28, (42, 84)), ((100, 200), (28, 28), 7, (28, 56))],
)
def test_no_side_becomes_shorter_than_a_window(size: Any, window: Any, short_side: int, expected: Any) -> None:
    assert views(window, short_side=short_side).evaluated_size(size) == expected
