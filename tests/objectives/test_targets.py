"""What is predicted of a patch, and patches as rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mapet import Features, Ids, MapetError, Pixels
from mapet.objectives.cross_entropy import linear_cross_entropy
from mapet.objectives.patches import patchify

AS_IT_IS: Any = nn.Identity()  # in place of a head: the rows are the predictions


@pytest.mark.parametrize("most_logits", [1, 50, 2**24])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-6), (torch.bfloat16, 0.03)])
def test_ids_are_scored_by_cross_entropy_and_accuracy(
    most_logits: int, dtype: torch.dtype | None, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of one row and more, with the gradients of torch's own functions."""
    monkeypatch.setattr("mapet.objectives.cross_entropy.MOST_LOGITS", most_logits)
    torch.manual_seed(0)
    head, rows, wanted = nn.Linear(5, 9), torch.randn(4, 6, 5, requires_grad=True), torch.randint(0, 9, (4, 6))
    inputs = (rows, head.weight, head.bias)
    logits = head(rows)
    expected = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        score = Ids(9).score(rows, head, wanted)
        with torch.no_grad():
            assert Ids(9).score(rows, head, wanted) == score
    assert score["loss"].dtype == torch.float32
    assert score["loss"].item() == pytest.approx(expected.item(), rel=tolerance)
    assert score["accuracy"].item() == pytest.approx((logits.argmax(-1) == wanted).float().mean().item(), abs=0.05)
    gradients = torch.autograd.grad(3 * score["loss"], inputs), torch.autograd.grad(3 * expected, inputs)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=tolerance)


def test_logits_are_not_in_memory_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mapet.objectives.cross_entropy.MOST_LOGITS", 1000)
    head, rows, ids = nn.Linear(4, 100), torch.randn(500, 4), torch.zeros(500, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(rows, head.weight, head.bias, ids)[0].backward()
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(sizes) < 4 * 500 * 100 / 10


def test_normalised_pixels_cost_nothing_if_right_and_one_if_the_mean() -> None:
    images = 3 * torch.randn(2, 3, 28, 28) + 5
    target = Pixels((7, 7), 3)
    wanted = target.values(images, None)
    assert wanted.shape == (2, 16, target.width) == (2, 16, 147)
    normalised = (wanted - wanted.mean(-1, keepdim=True)) / wanted.std(-1, keepdim=True)
    assert target.score(normalised, AS_IT_IS, wanted)["loss"] < 1e-6
    assert target.score(torch.zeros_like(wanted), AS_IT_IS, wanted)["loss"].item() == pytest.approx(
        1 - 1 / 147, abs=1e-4
    )


@pytest.mark.parametrize(("distance", "expected"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_raw_pixels_have_two_distances(distance: Any, expected: Callable[..., Any]) -> None:
    prediction, wanted = torch.randn(2, 2, 5, 12)
    assert Pixels((2, 2), 3, normalised=False, distance=distance).score(prediction, AS_IT_IS, wanted) == {
        "loss": expected(prediction, wanted)
    }


def test_features_are_scored_by_direction_or_after_normalisation() -> None:
    prediction, wanted = torch.randn(2, 2, 5, 8)
    cosine = F.cosine_similarity(prediction, wanted, dim=-1).mean()
    assert Features(8).score(prediction, AS_IT_IS, wanted) == {"loss": 1 - cosine, "cosine": cosine}
    score = Features(8, "smooth_l1").score(prediction, AS_IT_IS, 7 * wanted)
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
