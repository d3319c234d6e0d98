from __future__ import annotations

import pytest
import torch
from mapet.engine.schedule import warmup_cosine

SHAPE = {"total": 100, "warmup": 10, "start": 0.1, "peak": 1.0, "end": 0.2}


def test_corners() -> None:
    assert warmup_cosine(0, **SHAPE) == pytest.approx(0.1)
    assert warmup_cosine(5, **SHAPE) == pytest.approx(0.55)
    assert warmup_cosine(10, **SHAPE) == pytest.approx(1.0)
    assert warmup_cosine(55, **SHAPE) == pytest.approx(0.6)
    assert warmup_cosine(100, **SHAPE) == pytest.approx(0.2)
    assert warmup_cosine(0, **{**SHAPE, "warmup": 0}) == pytest.approx(1.0)


def test_it_is_torchs_cosine_after_the_warm_up() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.2)
    for step in range(10, 100):
        assert warmup_cosine(step, **SHAPE) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()
