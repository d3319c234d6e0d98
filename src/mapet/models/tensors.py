"""Tensors in files made by others: read without running code in them, and compared with the tensors that are wanted."""

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

# Keys under which authors store the state dict, the most common first.
NESTED = ("state_dict", "model", "module")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read a safetensors file, or a file written by ``torch.save``.

    No code in the file is run: besides tensors, numbers and plain containers only ``argparse.Namespace`` is accepted,
    which the files of MAE, BEiT and timm hold beside the weights. A dictionary under ``state_dict``, ``model`` or
    ``module`` is unwrapped, and the prefixes ``module.`` and ``_orig_mod.`` are removed.

    Returns:
        The tensors by name, and the names of all other entries.

    Raises:
        MapetError: if the file is missing or damaged, needs other Python objects, holds no state dict, or holds a
            tensor that is not a plain array of numbers.
    """
    if not path.is_file():
        raise MapetError(f"weights {path} do not exist or are no file; pass the path of a downloaded file")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises errors of many types
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            reason = f"they need the Python object {foreign[1]}, and loading that might run code"
            advice = "save the state dict alone, if you trust the file"
        else:
            reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
            advice = "the file may be cut short or no checkpoint, pass a state dict as torch or safetensors saves it"
        raise MapetError(f"weights {path} cannot be read as tensors: {reason}; {advice}") from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise MapetError(f"weights {path} hold a {kind}, not a state dict; pass a state dict as torch saves it")
    tensors, others = flatten_state(content)
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise MapetError(
                f"tensor {name!r} in weights {path} is not a plain array (it is of type "
                f"{str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}); save it as float32, float16 or bfloat16"
            )
    return tensors, others


def flatten_state(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of a checkpoint's state dict by their plain names, and the names of all other entries."""
    others: list[str] = []
    for key in NESTED:
        nested = content.get(key)
        if isinstance(nested, Mapping):
            others += [str(name) for name in content if name != key]
            content = nested
    plain: dict[str, Any] = timm.models.clean_state_dict({str(name): value for name, value in content.items()})
    others += [name for name, value in plain.items() if not isinstance(value, Tensor)]
    return {name: value for name, value in plain.items() if isinstance(value, Tensor)}, tuple(others)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has values, strides, and a type that converts to float32 without a scale."""
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided:
        return False
    is_float8 = tensor.is_floating_point() and tensor.element_size() == 1
    return not (tensor.is_complex() or is_float8)


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path, what: str) -> None:
    """Check that ``found`` has each tensor of ``wanted``, of the same shape, and of floats where floats are wanted.

    Args:
        found, wanted: tensors by name.
        path: of the file, for the message.
        what: the network that the tensors must fit, for the message.

    Raises:
        MapetError: naming the first tensor that is missing or different.
    """
    missing = [name for name in wanted if name not in found]
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    integers = [name for name in wanted if name in found and _is_integer(found[name]) and not _is_integer(wanted[name])]
    if missing:
        problem = f"{missing[0]!r} is missing"
    elif wrong:
        problem = f"{wrong[0]!r} has shape {tuple(found[wrong[0]].shape)} instead of {tuple(wanted[wrong[0]].shape)}"
    elif integers:
        problem = f"{integers[0]!r} is of type {found[integers[0]].dtype}, not of floats"
    else:
        return
    raise MapetError(
        f"weights {path} do not fit {what}: {problem} ({len(missing)} missing, {len(wrong)} of wrong shape of "
        f"{len(wanted)}); pass the weights of that network"
    )


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()
