from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mapet import MapetError
from mapet.data.views import PlainView
from mapet.inference.models import OpenModel
from mapet.jobs.export.onnx import write_onnx
from mapet.jobs.export.program import write_program

VIEW = PlainView((4, 4), (0.5,), (0.5,))


class Decides(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


class Decomposes(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.svd(images[:, 0])[1]


def test_what_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    for write in (write_program, write_onnx):
        with pytest.raises(MapetError, match="'decides' cannot be exported by torch.export: "):
            write(OpenModel("decides", Decides(), VIEW, 1, ()), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_onnx_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="'decomposes' cannot be expressed in ONNX: "):
        write_onnx(OpenModel("decomposes", Decomposes(), VIEW, 1, ()), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_large_for_a_file_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = nn.Linear(25_000, 25_000)
    with pytest.raises(MapetError, match="take 2.3 GiB, too much for one ONNX file .* use mapet export torch"):
        write_onnx(OpenModel("large", network, VIEW, 1, ()), tmp_path / "model.onnx")
