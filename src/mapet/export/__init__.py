"""Getting a trained model out: for timm and the hub, for ONNX Runtime, for torch.export."""

from mapet.export.card import model_card, read_origin, read_run
from mapet.export.check import Agreement, compare
from mapet.export.onnx import read_onnx, require_onnx, write_onnx
from mapet.export.program import read_program, write_program
from mapet.export.timm_folder import export_network

__all__ = [
    "Agreement",
    "compare",
    "export_network",
    "model_card",
    "read_onnx",
    "read_origin",
    "read_program",
    "read_run",
    "require_onnx",
    "write_onnx",
    "write_program",
]
