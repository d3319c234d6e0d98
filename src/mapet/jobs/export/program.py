"""Export as a ``torch.export`` program, ``.pt2``: runs in PyTorch without the code that defined the model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mapet.errors import MapetError
from mapet.inference.models import OpenModel
from mapet.jobs.export.inputs import describe_inputs

INPUTS_FILE = "mapet.json"


def trace(opened: OpenModel) -> ExportedProgram:
    """Return a model's float32 program for ``(B, C, H, W)`` images, ``B`` any number.

    Raises:
        MapetError: if the network does something that cannot be traced.
    """
    # Of two images: a batch of one would be taken for a constant.
    images = torch.zeros(2, opened.channels, *opened.view.size)
    try:
        program = torch.export.export(opened.network, (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # torch._dynamo's, torch.fx's, and whatever the network raises on what it is given
        raise MapetError(f"model {opened.name!r} cannot be exported by torch.export: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the folders of this machine
    return program


def write_program(opened: OpenModel, file: Path) -> None:
    """Write a model's program; the archive's ``mapet.json`` holds what ``describe_inputs`` says.

    Raises:
        MapetError: if it cannot be traced.
    """
    # Made in memory: when a disk is full, torch's archive writer takes the whole process down.
    archive = io.BytesIO()
    torch.export.save(trace(opened), archive, extra_files={INPUTS_FILE: json.dumps(describe_inputs(opened))})
    file.write_bytes(archive.getbuffer())


def read_program(file: Path) -> nn.Module:
    """Read a program that ``write_program`` wrote, as a module."""
    with file.open("rb") as stream:
        return torch.export.load(stream).module()


def first_line(error: Exception) -> str:
    """Return what an error says, shortened to a line."""
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
