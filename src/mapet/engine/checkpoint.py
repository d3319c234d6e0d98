"""Checkpoints: everything that continuing needs.

A checkpoint is a folder of ``task.safetensors``, ``optimizer.safetensors`` and ``state.json``. There is no random state
in it: all randomness is a function of the seed and the step.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mapet.errors import MapetError, reason_of

TASK_FILE, OPTIMIZER_FILE, STATE_FILE = "task.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class MadeFrom:
    """What a run trains on; a resumed run must have the same images and targets.

    Attributes:
        images: how many.
        fingerprint: of the image set.
        targets: hash of what makes the targets.
        processes: that trained together.
    """

    images: int
    fingerprint: str
    targets: str
    processes: int


@dataclass(frozen=True)
class State:
    """What a checkpoint holds besides tensors.

    Attributes:
        step: optimiser steps done.
        total_steps: of the whole run.
        made_from: what the run trains on.
        damaged: indices of images that cannot be read.
        scaler: state of fp16's gradient scaler; None in other precisions.
        optimizer: its slots that are numbers; ``write_checkpoint`` fills them in.
        lowest_loss: see ``LossWatch``.
    """

    step: int
    total_steps: int
    made_from: MadeFrom
    damaged: list[int]
    scaler: dict[str, float | int] | None
    optimizer: dict[str, float | int] = field(default_factory=dict)
    lowest_loss: float | None = None


def write_checkpoint(folder: Path, task: nn.Module, optimizer: Optimizer, state: State) -> None:
    """Write a checkpoint into an existing folder.

    The optimizer's slots must be tensors and numbers, as torch's and timm's are. Its settings are the configuration's
    and are not saved.
    """
    save_file(_contiguous(task.state_dict()), folder / TASK_FILE)
    slots = {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    tensors = {name: value for name, value in slots.items() if isinstance(value, Tensor)}
    save_file(_contiguous(tensors), folder / OPTIMIZER_FILE)
    numbers = {name: value for name, value in slots.items() if name not in tensors}
    (folder / STATE_FILE).write_text(json.dumps(asdict(replace(state, optimizer=numbers)), indent=1) + "\n")


def read_state(folder: Path) -> State:
    """Read a checkpoint's ``state.json``.

    Raises:
        MapetError: if it is missing or damaged.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_text())
        state = State(**{**content, "made_from": MadeFrom(**content["made_from"])})
        if not 0 <= state.step <= state.total_steps or any(i >= state.made_from.images for i in state.damaged):
            raise ValueError(f"step {state.step} of {state.total_steps}, {state.made_from.images} images")
        return state
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged_checkpoint(folder, error) from error


def read_checkpoint(folder: Path, task: nn.Module, optimizer: Optimizer) -> State:
    """Load a checkpoint into a task and its optimizer; return its state.

    Raises:
        MapetError: if the checkpoint is damaged or belongs to another architecture.
    """
    state = read_state(folder)
    try:
        task.load_state_dict(load_file(folder / TASK_FILE))
        slots: dict[int, dict[str, Any]] = {}
        for name, value in {**load_file(folder / OPTIMIZER_FILE), **state.optimizer}.items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise damaged_checkpoint(folder, error) from error
    return state


def damaged_checkpoint(folder: Path, error: Exception) -> MapetError:
    """Return the error for a checkpoint that cannot be used, with the reason."""
    return MapetError(
        f"checkpoint {folder} is damaged ({reason_of(error)}); restore it, or remove it to start from the beginning"
    )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
