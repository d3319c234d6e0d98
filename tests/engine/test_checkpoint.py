from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mapet import MaPeT, MapetError
from mapet.engine.checkpoint import MadeFrom, State, read_checkpoint, write_checkpoint
from mapet.engine.optimizer import build_optimizer

STATE = State(
    total_steps=9,
    step=3,
    made_from=MadeFrom(images=9, fingerprint="f", targets="t", processes=1),
    damaged=[4],
    scaler={"scale": 2.0},
)


def trained(build: Callable[..., Any], steps: int = 3) -> tuple[MaPeT, torch.optim.Optimizer]:
    objective = MaPeT(build(), 9)
    optimizer = build_optimizer(objective, 1e-2, 0.05, 0.98)
    for step in range(steps):
        advance(objective, optimizer, step)
    return objective, optimizer


def advance(objective: MaPeT, optimizer: torch.optim.Optimizer, step: int) -> float:
    torch.manual_seed(step)
    output = objective(torch.randn(2, 3, 28, 28), torch.randint(0, 9, (2, 16)))
    output["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(output["loss"].detach())


def test_everything_is_restored(tiny_vit: Callable[..., Any], tmp_path: Path) -> None:
    objective, optimizer = trained(tiny_vit)
    write_checkpoint(tmp_path, objective, optimizer, STATE)
    other, its_optimizer = trained(tiny_vit, steps=0)
    assert read_checkpoint(tmp_path, other, its_optimizer) == STATE
    for step in range(3, 6):
        assert advance(objective, optimizer, step) == advance(other, its_optimizer, step)


def test_damaged_and_foreign_checkpoints_are_refused(tiny_vit: Callable[..., Any], tmp_path: Path) -> None:
    objective, optimizer = trained(tiny_vit)
    write_checkpoint(tmp_path, objective, optimizer, STATE)
    wider = MaPeT(tiny_vit(embed_dim=64), 9)
    with pytest.raises(MapetError, match="cannot be read.*size mismatch"):
        read_checkpoint(tmp_path, wider, build_optimizer(wider, 1e-2, 0.05, 0.98))
    for name in ("optimizer.safetensors", "state.json", "objective.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(MapetError, match="cannot be read.*start again from the beginning"):
            read_checkpoint(tmp_path, objective, optimizer)
        (tmp_path / name).write_bytes(whole)
    read_checkpoint(tmp_path, objective, optimizer)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("step", None, "lacks 'step'"),
        ("step", "3", "step = '3'"),
        ("step", -1, "step = -1"),
        ("made_from", 7, "made_from = 7"),
        ("made_from", {"images": 9, "fingerprint": "f", "processes": 1}, "lacks 'made_from.targets'"),
        ("made_from", {"images": "9"}, "made_from"),
        ("damaged", None, "lacks 'damaged'"),
        ("damaged", ["x"], "damaged.0 = 'x'"),
        ("damaged", [9], "damaged has the index 9, but there are 9 images"),
        ("scaler", 3, "scaler = 3"),
        ("optimizer", None, "lacks 'optimizer'"),
        ("optimizer", {"0.exp_avg": "x"}, "optimizer"),
        ("optimizer", {"first": 1}, "first|unpack"),
        ("more", 1, "unknown key 'more'"),
    ],
)
def test_an_edited_state_is_named(
    key: str, value: object, says: str, tiny_vit: Callable[..., Any], tmp_path: Path
) -> None:
    objective, optimizer = trained(tiny_vit, steps=1)
    write_checkpoint(tmp_path, objective, optimizer, STATE)
    content = json.loads((tmp_path / "state.json").read_text())
    if value is None:
        del content[key]
    else:
        content[key] = value
    (tmp_path / "state.json").write_text(json.dumps(content))
    with pytest.raises(MapetError, match=f"checkpoint {tmp_path} cannot be read .*({says}).*start again"):
        read_checkpoint(tmp_path, objective, optimizer)
    (tmp_path / "state.json").write_text("[3]")
    with pytest.raises(MapetError, match="state.json holds a list"):
        read_checkpoint(tmp_path, objective, optimizer)
