"""The formats of exports: each function writes a model, and returns the function that the written file computes."""

import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mapet.errors import MapetError, first_line
from mapet.inference.models import OpenModel
from mapet.jobs.export.config import TimmExportConfig
from mapet.models.export import export_network

Exported = Callable[[Tensor], Tensor]
# The lowest opset that torch's exporter writes without conversion, so that most engines read it.
OPSET = 18
# Above this size torch puts the weights into a second file; the limit of ONNX itself is 2 GiB.
MOST_BYTES = 3 * 2**29


def write_timm(opened: OpenModel, folder: Path, config: TimmExportConfig) -> Exported:
    """Write the weights and the configuration of a model for timm, see ``export_network``."""
    view = opened.view
    export_network(
        opened.network,
        folder,
        view.mean,
        view.std,
        crop_pct=view.crop_pct,
        interpolation=view.interpolation,
        classes=opened.classes,
        license=config.license,
        value_range=opened.reading.value_range,
        tag="untrained" if config.reinit else None,
        dtype=getattr(torch, config.dtype),
    )
    network: Exported = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return network


def write_torch(opened: OpenModel, file: Path) -> Exported:
    """Write a model as a ``torch.export`` program, which runs in PyTorch without the code that defined the model.

    The file ``mapet.json`` in the archive holds what ``describe_inputs`` returns.

    Raises:
        MapetError: if the model cannot be traced.
    """
    # In memory first: on a full disk torch's archive writer ends the whole process.
    archive = io.BytesIO()
    torch.export.save(_trace(opened), archive, extra_files={"mapet.json": json.dumps(describe_inputs(opened))})
    file.write_bytes(archive.getbuffer())
    with file.open("rb") as stream:
        return torch.export.load(stream).module()


def require_onnx() -> None:
    """Raise MapetError if a package that ``write_onnx`` needs is not installed."""
    lacking = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if lacking:
        raise MapetError(f"export to ONNX needs the package {lacking[0]}: pip install 'mapet[onnx]'")


def write_onnx(opened: OpenModel, file: Path) -> Exported:
    """Write a model as ONNX, from ``images`` ``(batch, C, H, W)`` to ``logits`` or ``features`` ``(batch, D)``.

    The file's metadata hold what ``describe_inputs`` returns, each value as JSON. ONNX Runtime runs it on the CPU.

    Raises:
        MapetError: if the model is too large for one file, or has an operation that ONNX cannot express.
    """
    size = sum(value.nbytes for value in opened.network.state_dict().values())
    if size > MOST_BYTES:
        raise MapetError(
            f"the weights of {opened.name!r} take {size / 2**30:.1f} GiB, too much for one ONNX file (at most "
            f"{MOST_BYTES / 2**30:g}); use mapet export torch"
        )
    program, outputs = _trace(opened), ["logits" if opened.classes else "features"]
    try:
        exported = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=outputs, opset_version=OPSET, verbose=False
        )
    except torch.onnx.OnnxExporterError as error:
        raise MapetError(f"model {opened.name!r} cannot be expressed in ONNX: {first_line(error)}") from error
    assert exported is not None, "with dynamo=True there is a program"
    exported.model.metadata_props.update({key: json.dumps(value) for key, value in describe_inputs(opened).items()})
    exported.save(file)

    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def describe_inputs(opened: OpenModel) -> dict[str, Any]:
    """Return how images are made into a model's input, and what its output means; stored inside exported files.

    Returns:
        JSON-able: ``input_size`` (channels, rows, columns), ``mean`` and ``std`` of pixels in [0, 1], ``crop_pct``,
        ``crop_mode`` (timm's: "center", or "squash", which resizes both sides), ``interpolation``, ``value_range``
        (see ``Reading``), and ``classes``, which is empty for a model that returns features.
    """
    view = opened.view
    return {
        "input_size": [opened.reading.channels, *view.size],
        "mean": list(view.mean),
        "std": list(view.std),
        "crop_pct": view.crop_pct,
        "crop_mode": "squash" if view.squash else "center",
        "interpolation": view.interpolation,
        "value_range": opened.reading.value_range,
        "classes": list(opened.classes),
    }


def _trace(opened: OpenModel) -> ExportedProgram:
    """Return a model's float32 program for ``(B, C, H, W)`` images, ``B`` any number.

    Raises:
        MapetError: if the network does something that cannot be traced.
    """
    # Two images: torch.export would take a batch of one for a constant.
    images = torch.zeros(2, opened.reading.channels, *opened.view.size)
    try:
        program = torch.export.export(opened.network, (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # of torch._dynamo, torch.fx or the network
        raise MapetError(f"model {opened.name!r} cannot be exported by torch.export: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the folders of this machine
    return program
