"""Export as an ONNX file, for ONNX Runtime and other engines."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from mapet.errors import MapetError
from mapet.inference.models import OpenModel
from mapet.jobs.export.program import describe_inputs, first_line, output_name, trace

# The lowest opset that torch's exporter writes without conversion, so that most engines read it.
OPSET = 18
# Above this size torch puts the weights into a second file; the limit of ONNX itself is 2 GiB.
MOST_BYTES = 3 * 2**29


def require_onnx() -> None:
    """Raise MapetError if a package that this format needs is not installed."""
    lacking = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if lacking:
        raise MapetError(f"export to ONNX needs the package {lacking[0]}: pip install 'mapet[onnx]'")


def write_onnx(opened: OpenModel, file: Path) -> None:
    """Write a model as ONNX, from ``images`` ``(batch, C, H, W)`` to ``logits`` or ``features`` ``(batch, D)``.

    The file's metadata hold what ``describe_inputs`` returns, each value as JSON.

    Raises:
        MapetError: if the model is too large for one file, or has an operation that ONNX cannot express.
    """
    size = sum(value.nbytes for value in opened.network.state_dict().values())
    if size > MOST_BYTES:
        raise MapetError(
            f"the weights of {opened.name!r} take {size / 2**30:.1f} GiB, too much for one ONNX file (at most "
            f"{MOST_BYTES / 2**30:g}); use mapet export torch"
        )
    program, output = trace(opened), output_name(opened)
    try:
        exported = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=[output], opset_version=OPSET, verbose=False
        )
    except torch.onnx.OnnxExporterError as error:
        raise MapetError(f"model {opened.name!r} cannot be expressed in ONNX: {first_line(error)}") from error
    assert exported is not None, "with dynamo=True there is a program"
    exported.model.metadata_props.update({key: json.dumps(value) for key, value in describe_inputs(opened).items()})
    exported.save(file)


def read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    """Return a function that runs an ONNX file by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
