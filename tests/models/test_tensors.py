import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mapet import MapetError
from mapet.models.tensors import check_fit, read_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    ("content", "others"),
    [
        (TENSORS, ""),
        ({"model": TENSORS, "model_ema": {"a": torch.zeros(1)}}, "model_ema"),
        ({"state_dict": {**TENSORS, "note": 1}, "epoch": 3}, "epoch, note"),
        ({"model": TENSORS, "args": argparse.Namespace(lr=1e-3, nested=argparse.Namespace(name="x"))}, "args"),
        ({f"module._orig_mod.{name}": tensor for name, tensor in TENSORS.items()}, ""),
    ],
)
def test_common_layouts_of_torch_files_are_read(
    content: dict[str, Any], others: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "mapet"):
        assert same(read_tensors(tmp_path / "w.pth"))
    said = [f"{tmp_path / 'w.pth'}: entries besides the weights are not used: {others}"] if others else []
    assert [record.getMessage() for record in caplog.records] == said


def test_safetensors_files_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert same(read_tensors(tmp_path / "w.safetensors"))
    with pytest.raises(MapetError, match="none.pth do not exist"):
        read_tensors(tmp_path / "none.pth")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    for other in (Malicious(target), argparse.Namespace(lr=Malicious(target))):
        torch.save({"model": TENSORS, "other": other}, tmp_path / "w.pth")
        with pytest.raises(
            MapetError, match=r"w.pth cannot be read as tensors: they need the Python object .*save the"
        ):
            read_tensors(tmp_path / "w.pth")
        assert not target.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert target.exists(), "torch alone must run the code in this file"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>Sign in</html>", bytes(100), b"\x80\x02K\x01."])
def test_other_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MapetError, match=f"{name} (cannot be read as tensors|hold a int, not a state dict)"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"a": TENSORS["a"]}, "'b' is missing"),
        ({**TENSORS, "a": torch.ones(6)}, r"'a' has shape \(6,\) instead of \(2, 3\)"),
        ({**TENSORS, "own.c": torch.ones(1)}, "'own.c' is unknown"),
        ({**TENSORS, "b": torch.ones(4, dtype=torch.long)}, "'b' is of type torch.int64, not of plain floats"),
        ({**TENSORS, "b": torch.ones(4, dtype=torch.complex64)}, "'b' is of type torch.complex64"),
        ({**TENSORS, "b": torch.ones(4).to(torch.float8_e4m3fn)}, "'b' is of type torch.float8_e4m3fn"),
    ],
)
def test_tensors_must_fit_by_name_shape_and_type(found: dict[str, torch.Tensor], says: str) -> None:
    more = {**TENSORS, "more": torch.ones(1), "b": torch.ones(4).bfloat16()}
    check_fit(more, TENSORS, "w.pth", "this", prefixes=("own.",))
    with pytest.raises(MapetError, match=f"weights of w.pth do not fit this: {says}"):
        check_fit(found, TENSORS, "w.pth", "this", prefixes=("own.",))
