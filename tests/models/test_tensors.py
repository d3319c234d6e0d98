from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mapet import MapetError
from mapet.models.tensors import check_fit, read_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = TENSORS) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"model": TENSORS},
        {"state_dict": TENSORS, "epoch": 3},
        {"model": TENSORS, "args": argparse.Namespace(lr=1e-3, layers=[1, 2], nested=argparse.Namespace(name="x"))},
        {**TENSORS, "note": "no tensor"},
        {f"module.{name}": tensor for name, tensor in TENSORS.items()},
    ],
    ids=["flat", "model", "state_dict", "namespace", "others", "ddp"],
)
def test_layouts_of_torch_files(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert same(read_tensors(tmp_path / "w.pth")[0])


def test_the_plain_weights_are_read_not_their_average(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "model_ema": {"a": torch.zeros(1)}}, tmp_path / "w.pth")
    assert same(read_tensors(tmp_path / "w.pth")[0])


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    for content in (
        {"model": TENSORS, "other": Malicious(target)},
        {"model": TENSORS, "args": argparse.Namespace(lr=Malicious(target))},
    ):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(
            MapetError,
            match="w.pth cannot be read as tensors: they need the Python object .*; save the state dict alone",
        ):
            read_tensors(tmp_path / "w.pth")
        assert not target.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert target.exists(), "the file must be one that would have done it"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world", b"<html>Sign in</html>", bytes(100), b"\x80\x02K\x01."])
def test_files_of_something_else_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MapetError, match=f"{name} cannot be read as tensors"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], None])
def test_torch_files_of_something_else_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(MapetError, match="w.pth cannot be read as tensors"):
        read_tensors(tmp_path / "w.pth")


def test_every_damage_is_a_sentence(tmp_path: Path) -> None:
    """Bytes changed at random fail inside the unpickler in many ways, or are not noticed."""
    torch.save({"model": TENSORS, "args": argparse.Namespace(x=1)}, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for position in torch.randint(len(whole), (8,), generator=generator):
            damaged[position] = int(torch.randint(256, (), generator=generator))
        (tmp_path / "w.pth").write_bytes(damaged)
        try:
            read_tensors(tmp_path / "w.pth")
        except MapetError:
            refused += 1
    assert refused > 30


def test_fit_is_by_name_and_shape() -> None:
    check_fit({**TENSORS, "more": torch.ones(1)}, TENSORS, "w.pth", "this")
    with pytest.raises(MapetError, match=r"w.pth do not fit this: 'b' is missing \(1 missing, 0 of wrong shape of 2\)"):
        check_fit({"a": TENSORS["a"]}, TENSORS, "w.pth", "this")
    with pytest.raises(
        MapetError, match=r"'a' has shape \(6,\) instead of \(2, 3\) \(0 missing, 1 of wrong shape of 2"
    ):
        check_fit({**TENSORS, "a": torch.ones(6)}, TENSORS, "w.pth", "this")
    for tensor in (torch.ones(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(MapetError, match=r"w.pth do not fit this: 'b' is of type (int64|bool), not of floats"):
            check_fit({**TENSORS, "b": tensor}, TENSORS, "w.pth", "this")
    check_fit({**TENSORS, "b": torch.ones(4, dtype=torch.bfloat16)}, TENSORS, "w.pth", "this")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.empty(4, device="meta"), "holds no values"),
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "is quantised"),
        (lambda: torch.ones(4).to_sparse(), "is sparse or nested"),
        (lambda: torch.eye(4).to_sparse_csr(), "is sparse or nested"),
        (lambda: torch.ones(4, dtype=torch.complex64), "is of type complex64"),
        (lambda: torch.ones(4).to(torch.float8_e4m3fn), "is of type float8_e4m3fn"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, of what it means to drop
def test_tensors_that_are_no_plain_arrays_are_named(
    make: Callable[[], torch.Tensor], says: str, tmp_path: Path
) -> None:
    torch.save({"model": {**TENSORS, "odd": make()}}, tmp_path / "w.pth")
    with pytest.raises(MapetError, match=rf"tensor 'odd' in weights .*w.pth {says}.*; save it as plain float32"):
        read_tensors(tmp_path / "w.pth")


def test_what_else_is_in_a_file_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"module._orig_mod.a": TENSORS["a"], "note": 1}, "epoch": 3}, tmp_path / "w.pth")
    found, others = read_tensors(tmp_path / "w.pth")
    assert same(found, {"a": TENSORS["a"]})
    assert others == ("epoch", "note")
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert same(read_tensors(tmp_path / "w.safetensors")[0])
    with pytest.raises(MapetError, match="none.pth do not exist"):
        read_tensors(tmp_path / "none.pth")
