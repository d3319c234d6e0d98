"""Checkpoints: everything that continuing needs.

A checkpoint is a folder of ``objective.safetensors``, ``optimizer.safetensors`` and ``state.json``. There is
no random state in it: all randomness is a function of the seed and the step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from mapet.errors import MapetError


def write_checkpoint(folder: Path, objective: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write a checkpoint into an existing folder.

    Args:
        folder: where.
        objective: the module that is trained.
        optimizer: its optimizer; the state must be tensors and numbers, as torch's and timm's are.
        state: JSON-able rest: ``step``, what it was ``made_from``, ...
    """
    save_file(_contiguous(objective.state_dict()), folder / "objective.safetensors")
    content = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, slots in content["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    save_file(_contiguous(tensors), folder / "optimizer.safetensors")
    saved = {**state, "optimizer": {"numbers": numbers, "param_groups": content["param_groups"]}}
    (folder / "state.json").write_text(json.dumps(saved, indent=1) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's ``state.json``."""
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        for key, kind in (("step", int), ("made_from", dict)):
            if not isinstance(state[key], kind):
                raise TypeError(f"its {key} is {state[key]!r}")
        return state
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, error) from error


def read_checkpoint(folder: Path, objective: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a checkpoint into an objective and its optimizer; return the state given to ``write_checkpoint``.

    Raises:
        MapetError: if the checkpoint is damaged or belongs to another architecture.
    """
    state = read_state(folder)
    try:
        objective.load_state_dict(load_file(folder / "objective.safetensors"))
        saved = state.pop("optimizer")
        slots: dict[int, dict[str, Any]] = {}
        entries = {**load_file(folder / "optimizer.safetensors"), **saved["numbers"]}
        for key, value in entries.items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": slots, "param_groups": saved["param_groups"]})
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    return state


def _damaged(folder: Path, error: Exception) -> MapetError:
    reason = " ".join(str(error).split())[:200]
    return MapetError(f"checkpoint {folder} cannot be read ({reason}); remove it to start again from the beginning")


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
