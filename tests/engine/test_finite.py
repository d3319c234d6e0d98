import math
from typing import Any

import pytest
import torch
from torch import nn

from mapet import MapetError
from mapet.engine.finite import check_finite


def check(task: nn.Module, **changes: Any) -> None:
    values = {"step": 7, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "precision": "no", "inputs": [torch.zeros(2)]}
    check_finite(task=task, **{**values, **changes})


def test_finite_steps_and_overflows_of_fp16_pass() -> None:
    check(nn.Linear(2, 2))
    check(nn.Linear(2, 2), grad_norm=math.inf, precision="fp16")


def test_the_cause_is_named() -> None:
    task = nn.Linear(2, 2)
    with pytest.raises(MapetError, match=r"step 7: loss nan.*the input contains NaN.*No weight was changed"):
        check(task, loss=math.nan, inputs=[torch.zeros(2), torch.tensor([math.nan])])
    with pytest.raises(MapetError, match="forward pass overflowed"):
        check(task, loss=math.inf)
    task.weight.grad = torch.full((2, 2), math.inf)
    with pytest.raises(MapetError, match=r"gradients overflowed \(first 'weight'\); start another run with a lower"):
        check(task, grad_norm=math.inf)
    task.bias.data[0] = math.inf
    with pytest.raises(MapetError, match=r"weights were not finite before the step \(first 'bias'\)"):
        check(task, loss=math.nan)
