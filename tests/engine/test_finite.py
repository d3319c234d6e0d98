from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mapet import MapetError
from mapet.engine.finite import check_finite

GOOD = {"step": 7, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3, "precision": "no", "inputs": torch.zeros(2)}


def test_finite_steps_pass_and_so_do_fp16_overflows() -> None:
    check_finite(objective=nn.Linear(2, 2), **GOOD)
    check_finite(objective=nn.Linear(2, 2), **{**GOOD, "grad_norm": math.inf, "precision": "fp16"})


def test_the_cause_is_named() -> None:
    with pytest.raises(MapetError, match=r"step 7: loss nan.*input images contain NaN.*No weight was changed"):
        check_finite(objective=nn.Linear(2, 2), **{**GOOD, "loss": math.nan, "inputs": torch.tensor([math.nan])})
    broken = nn.Linear(2, 2)
    broken.bias.data[0] = math.inf
    with pytest.raises(MapetError, match=r"weights were not finite before the step \(first 'bias'\)"):
        check_finite(objective=broken, **{**GOOD, "loss": math.nan})
    overflown = nn.Linear(2, 2)
    overflown.weight.grad = torch.full((2, 2), math.inf)
    with pytest.raises(
        MapetError, match=r"gradients overflowed \(first 'weight'\); start another run with a lower --lr"
    ):
        check_finite(objective=overflown, **{**GOOD, "grad_norm": math.inf})
    with pytest.raises(MapetError, match="forward pass overflowed"):
        check_finite(objective=nn.Linear(2, 2), **{**GOOD, "loss": math.inf})
