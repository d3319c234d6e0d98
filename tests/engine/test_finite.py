import math
from typing import Any

import pytest
import torch
from torch import nn

from mapet.data.sources import Arrays, ImageSet
from mapet.engine.finite import find_cause, is_finite

IMAGES = ImageSet("x", Arrays(torch.zeros(9, 2, 2, dtype=torch.uint8).numpy()))


def cause(task: nn.Module, given: torch.Tensor, loss: float = math.nan) -> str:
    batch: Any = {"index": torch.tensor([4, 2, 8])}
    return find_cause(task, [given], loss, batch, IMAGES)


@pytest.mark.parametrize(
    ("loss", "norm", "precision", "finite"),
    [
        (1.0, 1.0, "no", True),
        (1.0, math.inf, "fp16", True),
        (1.0, math.inf, "bf16", False),
        (math.nan, 1, "fp16", False),
    ],
)
def test_which_steps_may_be_taken(loss: float, norm: float, precision: str, finite: bool) -> None:
    assert is_finite(loss, norm, precision) is finite


def test_where_it_began_is_named() -> None:
    task = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    given = torch.tensor([[0.0, 1.0], [math.nan, 0.0], [1.0, 1.0]])
    assert cause(task, given) == "the input contains NaN or infinity (images 2); look at --mean and --std"
    large = torch.tensor([[3e38, 3e38], [1.0, 1.0], [3e38, -3e38]])
    task[0].weight.data.fill_(1.0)
    task[0].bias.data.zero_()
    task[1].weight.data.fill_(1e30)
    assert cause(task, large) == "the forward pass overflowed, first in '0' (images 4)"
    assert cause(task, large / 100) == "the forward pass overflowed, first in '1' (images 4)"
    assert cause(task, torch.ones(3, 2)) == "the forward pass overflowed in the loss, or in another process"
    for layer in task:
        layer.weight.grad = torch.full((2, 2), math.inf)
    assert cause(task, given[:1], loss=1.0) == "the gradient of '1.weight' overflowed first"
    for layer in task:
        layer.weight.grad.fill_(1e38)
    assert cause(task, given[:1], loss=1.0) == "the norm of the gradients overflowed"
    task[1].bias.data[0] = math.inf
    assert cause(task, given[:1]) == "the weight '1.bias' was not finite before the step"
