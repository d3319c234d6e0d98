"""Export as a ``torch.export`` program, ``.pt2``: runs in PyTorch without the code that defined the model."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mapet.errors import MapetError
from mapet.inference.models import OpenModel

INPUTS_FILE = "mapet.json"


def describe_inputs(opened: OpenModel) -> dict[str, Any]:
    """Return how images are made into a model's input, and what its output means; stored inside exported files.

    Returns:
        JSON-able: ``input_size`` (channels, rows, columns), ``mean`` and ``std`` of pixels in [0, 1], ``crop_pct``,
        ``crop_mode`` (timm's: "center", or "squash", which resizes both sides), ``interpolation``, and ``classes``,
        which is empty for a model that returns features.
    """
    view = opened.view
    return {
        "input_size": [opened.channels, *view.size],
        "mean": list(view.mean),
        "std": list(view.std),
        "crop_pct": view.crop_pct,
        "crop_mode": "squash" if view.squash else "center",
        "interpolation": view.interpolation,
        "classes": list(opened.classes),
    }


def output_name(opened: OpenModel) -> str:
    """Return the name of a model's output: "logits", or "features" without a classifier."""
    return "logits" if opened.classes else "features"


def trace(opened: OpenModel) -> ExportedProgram:
    """Return a model's float32 program for ``(B, C, H, W)`` images, ``B`` any number.

    Raises:
        MapetError: if the network does something that cannot be traced.
    """
    # Two images: torch.export would take a batch of one for a constant.
    images = torch.zeros(2, opened.channels, *opened.view.size)
    try:
        program = torch.export.export(opened.network, (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # of torch._dynamo, torch.fx or the network
        raise MapetError(f"model {opened.name!r} cannot be exported by torch.export: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the folders of this machine
    return program


def write_program(opened: OpenModel, file: Path) -> None:
    """Write a model's program; ``mapet.json`` in the archive holds what ``describe_inputs`` returns.

    Raises:
        MapetError: if it cannot be traced.
    """
    # In memory first: on a full disk torch's archive writer ends the whole process.
    archive = io.BytesIO()
    torch.export.save(trace(opened), archive, extra_files={INPUTS_FILE: json.dumps(describe_inputs(opened))})
    file.write_bytes(archive.getbuffer())


def read_program(file: Path) -> nn.Module:
    """Read the program that ``write_program`` wrote, as a module."""
    with file.open("rb") as stream:
        return torch.export.load(stream).module()


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, shortened; the error's type if it has no text."""
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
