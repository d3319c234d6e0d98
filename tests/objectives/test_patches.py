from __future__ import annotations

import pytest
import torch

from mapet.objectives.patches import gather_rows, patchify, sincos_positions


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_cut_in_raster_order_channels_last(channels: int) -> None:
    images = torch.randn(2, channels, 6, 12)
    rows = patchify(images, (2, 3))
    assert rows.shape == (2, 12, 6 * channels)
    for patch in range(12):
        row, column = divmod(patch, 4)
        tile = images[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert torch.equal(rows[:, patch], tile.permute(0, 2, 3, 1).flatten(1))


def test_positions_tell_columns_in_one_half_and_rows_in_the_other() -> None:
    positions = sincos_positions((3, 5), 16)[0].unflatten(0, (3, 5))
    assert torch.equal(positions[0, :, :8], positions[2, :, :8])
    assert torch.equal(positions[:, 0, 8:], positions[:, 4, 8:])
    assert torch.allclose(positions[0, :, 0], torch.arange(5.0).sin(), atol=1e-6)
    assert len(positions.flatten(0, 1).unique(dim=0)) == 15


def test_rows_are_picked_image_by_image() -> None:
    x = torch.arange(12).view(2, 3, 2)
    assert gather_rows(x, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
