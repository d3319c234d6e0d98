"""Checkpoints: everything that continuing needs.

A checkpoint is a folder of ``objective.safetensors``, ``optimizer.safetensors`` and ``state.json``. There is
no random state in it: all randomness is a function of the seed and the step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mapet.config.base import StrictConfig, make_config
from mapet.errors import MapetError

Count = Annotated[int, Field(ge=0)]


class _Strict(StrictConfig):
    """Nothing is converted: what is written is read."""

    model_config = ConfigDict(strict=True)


class MadeFrom(_Strict):
    """What a run trains on; a resumed run must have the same, but for the processes.

    Attributes:
        images: how many.
        fingerprint: of the data set.
        targets: hash of what makes the targets.
        processes: that trained together.
    """

    images: Count
    fingerprint: str
    targets: str
    processes: int = Field(ge=1)


class State(_Strict):
    """What a checkpoint holds besides tensors.

    Attributes:
        step: optimiser steps done.
        total_steps: of the whole run.
        made_from: what the run trains on.
        damaged: indices of images that cannot be read.
        scaler: state of fp16's gradient scaler; None in other precisions.
    """

    step: Count
    total_steps: Count
    made_from: MadeFrom
    damaged: list[Count]
    scaler: dict[str, float | int] | None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if any(index >= self.made_from.images for index in self.damaged):
            raise ValueError(f"damaged has the index {max(self.damaged)}, but there are {self.made_from.images} images")
        return self


class _Saved(State):
    """``state.json``; ``optimizer`` holds those slots of the optimizer that are numbers, by parameter and name."""

    optimizer: dict[str, float | int]


def write_checkpoint(folder: Path, objective: nn.Module, optimizer: Optimizer, state: State) -> None:
    """Write a checkpoint into an existing folder.

    Args:
        folder: where.
        objective: the module that is trained.
        optimizer: its optimizer; its slots must be tensors and numbers, as torch's and timm's are. Its settings are
            the configuration's, and not saved.
        state: the rest.
    """
    save_file(_contiguous(objective.state_dict()), folder / "objective.safetensors")
    tensors, numbers = {}, {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    save_file(_contiguous(tensors), folder / "optimizer.safetensors")
    saved = {**state.model_dump(), "optimizer": numbers}
    (folder / "state.json").write_text(json.dumps(saved, indent=1) + "\n")


def read_state(folder: Path) -> State:
    """Read a checkpoint's ``state.json``.

    Raises:
        MapetError: if it is missing, damaged or was edited.
    """
    file = folder / "state.json"
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise TypeError(f"{file} holds a {type(content).__name__}")
        return make_config(_Saved, content, str(file))
    except (OSError, ValueError, TypeError, RecursionError, MapetError) as error:
        raise damaged_checkpoint(folder, error) from error


def read_checkpoint(folder: Path, objective: nn.Module, optimizer: Optimizer) -> State:
    """Load a checkpoint into an objective and its optimizer; return the state given to ``write_checkpoint``.

    Raises:
        MapetError: if the checkpoint is damaged or belongs to another architecture.
    """
    state = read_state(folder)
    assert isinstance(state, _Saved)
    try:
        objective.load_state_dict(load_file(folder / "objective.safetensors"))
        slots: dict[int, dict[str, Any]] = {}
        entries: dict[str, Any] = {**load_file(folder / "optimizer.safetensors"), **state.optimizer}
        for key, value in entries.items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise damaged_checkpoint(folder, error) from error
    return State(**state.model_dump(exclude={"optimizer"}))


def damaged_checkpoint(folder: Path, error: Exception) -> MapetError:
    """Say that a checkpoint cannot be used, and why."""
    reason = " ".join(str(error).split())[:300]
    return MapetError(f"checkpoint {folder} cannot be read ({reason}); remove it to start again from the beginning")


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
