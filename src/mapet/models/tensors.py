"""Tensors of files that others made: read without running anything in them, and held against those that are wanted."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor

from mapet.errors import MapetError

# Where authors put the state dict, first the likeliest.
NESTED = ("state_dict", "model", "module")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read the tensors of a safetensors file, or of a file written by ``torch.save``, and the names of all else in it.

    Nothing in it is executed: besides tensors, numbers and plain containers only an ``argparse.Namespace`` is let
    through, which MAE's, BEiT's and timm's own files keep beside the weights; making one stores attributes and calls
    nothing. A dictionary under ``state_dict``, ``model`` or ``module`` is unwrapped, and prefixes that wrappers of a
    model leave (``module.``, ``_orig_mod.``) are cut off.

    Raises:
        MapetError: if the file is missing, damaged, needs more than that, holds no tensors by name, or one that is not
            a plain array of numbers.
    """
    if not path.is_file():
        raise MapetError(f"weights {path} do not exist or are no file; pass the path of a downloaded file")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may fail in any way
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise MapetError(
                f"weights {path} cannot be read as tensors: they need the Python object {foreign[1]}, and loading "
                "that might run code; save the state dict alone, where you trust it"
            ) from error
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise MapetError(
            f"weights {path} cannot be read as tensors ({reason}); the file may be cut short or no checkpoint, pass a "
            "state dict as torch or safetensors saves it"
        ) from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise MapetError(f"weights {path} cannot be read as tensors: the file holds a {kind}, not a state dict")
    tensors, others = flatten_state(content)
    for name, tensor in tensors.items():
        if odd := _oddity(tensor):
            raise MapetError(
                f"tensor {name!r} in weights {path} {odd}; save it as plain float32, float16 or bfloat16 values"
            )
    return tensors, others


def flatten_state(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a checkpoint's state dict by their plain names, and the names of all else in it."""
    others: list[str] = []
    for key in NESTED:
        nested = content.get(key)
        if isinstance(nested, Mapping):
            others += [str(name) for name in content if name != key]
            content = nested
    plain: dict[str, Any] = timm.models.clean_state_dict({str(name): value for name, value in content.items()})
    others += [name for name, value in plain.items() if not isinstance(value, Tensor)]
    return {name: value for name, value in plain.items() if isinstance(value, Tensor)}, tuple(others)


def _oddity(tensor: Tensor) -> str | None:
    """Say why a tensor is no plain array of numbers; None if it is one."""
    if tensor.is_meta:
        return "holds no values (it is on the meta device)"
    if tensor.is_quantized:
        return "is quantised"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "is sparse or nested"
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() == 1):
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}"
    return None


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path, what: str) -> None:
    """Refuse weights that lack a tensor of ``wanted``, or have it in another shape or as integers instead of floats.

    Args:
        found, wanted: tensors by name.
        path: of the file, for the message.
        what: they should fit, for the message.
    """
    missing = [name for name in wanted if name not in found]
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if missing or wrong:
        first = (
            f"{missing[0]!r} is missing"
            if missing
            else f"{wrong[0]!r} has shape {tuple(found[wrong[0]].shape)} instead of {tuple(wanted[wrong[0]].shape)}"
        )
        raise MapetError(
            f"weights {path} do not fit {what}: {first} ({len(missing)} missing, {len(wrong)} of wrong shape of "
            f"{len(wanted)})"
        )
    for name, tensor in wanted.items():
        if tensor.is_floating_point() and not found[name].is_floating_point():
            kind = str(found[name].dtype).removeprefix("torch.")
            raise MapetError(f"weights {path} do not fit {what}: {name!r} is of type {kind}, not of floats")
