"""What is predicted of a patch, and patches as rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mapet import Features, Ids, MapetError, Pixels
from mapet.objectives.patches import patchify


def test_ids_are_scored_by_cross_entropy_and_accuracy() -> None:
    prediction, wanted = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    score = Ids(9).score(prediction, wanted)
    assert torch.allclose(score["loss"], -prediction.log_softmax(-1).gather(2, wanted[:, :, None]).mean())
    assert score["accuracy"] == (prediction.argmax(-1) == wanted).float().mean()


def test_normalised_pixels_cost_nothing_if_right_and_one_if_the_mean() -> None:
    images = 3 * torch.randn(2, 3, 28, 28) + 5
    target = Pixels((7, 7), 3)
    wanted = target.values(images, None)
    assert wanted.shape == (2, 16, target.width) == (2, 16, 147)
    normalised = (wanted - wanted.mean(-1, keepdim=True)) / wanted.std(-1, keepdim=True)
    assert target.score(normalised, wanted)["loss"] < 1e-6
    assert target.score(torch.zeros_like(wanted), wanted)["loss"].item() == pytest.approx(1 - 1 / 147, abs=1e-4)


@pytest.mark.parametrize(("distance", "expected"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_raw_pixels_have_two_distances(distance: Any, expected: Callable[..., Any]) -> None:
    prediction, wanted = torch.randn(2, 2, 5, 12)
    assert Pixels((2, 2), 3, normalised=False, distance=distance).score(prediction, wanted) == {
        "loss": expected(prediction, wanted)
    }


def test_features_are_scored_by_direction_or_after_normalisation() -> None:
    prediction, wanted = torch.randn(2, 2, 5, 8)
    cosine = F.cosine_similarity(prediction, wanted, dim=-1).mean()
    assert Features(8).score(prediction, wanted) == {"loss": 1 - cosine, "cosine": cosine}
    score = Features(8, "smooth_l1").score(prediction, 7 * wanted)
    assert torch.allclose(score["loss"], F.smooth_l1_loss(prediction, F.layer_norm(wanted, (8,))), atol=1e-4)
    assert torch.allclose(score["cosine"], cosine)


def test_targets_that_cannot_be_predicted_are_refused() -> None:
    with pytest.raises(MapetError, match="vocab_size is 1; a tokenizer needs at least 2 ids"):
        Ids(1)
    with pytest.raises(MapetError, match="patches of one pixel have no deviation"):
        Pixels((1, 1), 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_cut_in_raster_order_with_channels_last(channels: int) -> None:
    images = torch.randn(2, channels, 6, 12)
    rows = patchify(images, (2, 3))
    assert rows.shape == (2, 12, 6 * channels)
    for patch in range(12):
        row, column = divmod(patch, 4)
        tile = images[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert torch.equal(rows[:, patch], tile.permute(0, 2, 3, 1).flatten(1))
