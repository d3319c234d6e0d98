import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from mapet import Ids, MaPeT, MapetError
from mapet.config.base import settle
from mapet.config.keys import TrainKeys
from mapet.engine.checkpoint import MadeFrom, State, read_checkpoint, read_state, write_checkpoint
from mapet.engine.optimizer import build_optimizer

MADE_FROM = MadeFrom(images=9, fingerprint="f", targets="t", processes=1)
STATE = State(step=3, total_steps=9, made_from=MADE_FROM, damaged=[4], scaler={"scale": 2.0})


def train(backbone: Any, steps: int = 0) -> tuple[MaPeT, Optimizer]:
    task = MaPeT(backbone, Ids(9))
    optimizer = build_optimizer(task, settle(TrainKeys, {"data": "d", "lr": 1e-2}, images=9))
    for step in range(steps):
        advance(task, optimizer, step)
    return task, optimizer


def advance(task: MaPeT, optimizer: Optimizer, step: int) -> float:
    torch.manual_seed(step)
    output = task(torch.randn(2, 3, 28, 28), torch.randint(0, 9, (2, 16)))
    output["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(output["loss"].detach())


def test_a_checkpoint_restores_everything(tiny_vit: Callable[..., Any], tmp_path: Path) -> None:
    task, optimizer = train(tiny_vit(), steps=3)
    write_checkpoint(tmp_path, task, optimizer, STATE)
    other, its_optimizer = train(tiny_vit())
    assert read_checkpoint(tmp_path, other, its_optimizer) == read_state(tmp_path) == STATE
    for step in range(3, 6):
        assert advance(task, optimizer, step) == advance(other, its_optimizer, step)


def test_cut_and_foreign_checkpoints_are_refused(tiny_vit: Callable[..., Any], tmp_path: Path) -> None:
    task, optimizer = train(tiny_vit(), steps=1)
    write_checkpoint(tmp_path, task, optimizer, STATE)
    with pytest.raises(MapetError, match="is damaged .*size mismatch"):
        read_checkpoint(tmp_path, *train(tiny_vit(embed_dim=64)))
    for name in ("optimizer.safetensors", "state.json", "task.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(MapetError, match=f"checkpoint {tmp_path} is damaged .*; restore it, or remove it to start"):
            read_checkpoint(tmp_path, task, optimizer)
        (tmp_path / name).write_bytes(whole)
    read_checkpoint(tmp_path, task, optimizer)


def test_an_edited_state_is_refused(tiny_vit: Callable[..., Any], tmp_path: Path) -> None:
    task, optimizer = train(tiny_vit())
    write_checkpoint(tmp_path, task, optimizer, STATE)
    whole = json.loads((tmp_path / "state.json").read_text())
    without_step = {name: value for name, value in whole.items() if name != "step"}
    for edited in (
        without_step,
        {**whole, "step": "3"},
        {**whole, "step": 10},
        {**whole, "made_from": {"images": 9, "fingerprint": "f", "processes": 1}},
        {**whole, "damaged": [9]},
        {**whole, "optimizer": {"first": 1}},
        {**whole, "more": 1},
    ):
        (tmp_path / "state.json").write_text(json.dumps(edited))
        with pytest.raises(MapetError, match=f"checkpoint {tmp_path} is damaged"):
            read_checkpoint(tmp_path, task, optimizer)
