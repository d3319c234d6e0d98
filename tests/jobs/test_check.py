import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mapet import MapetError
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.inference.models import OpenModel
from mapet.jobs.export.formats import Exported, describe_inputs, write_onnx, write_torch
from mapet.jobs.export.run import compare

VIEW = PlainView((4, 4), (0.5,), (0.5,))


@pytest.fixture
def opened(tiny_vit: Callable[..., Any]) -> OpenModel:
    return OpenModel("tiny", tiny_vit(channels=1).eval(), PlainView((28, 28), (0.5,), (0.5,)), Reading(1), ())


@pytest.mark.parametrize("size", [1, 3, 28])
def test_an_export_that_is_wrong_for_one_batch_size_differs(size: int, opened: OpenModel, digits: Path) -> None:
    images = open_images(str(digits))
    assert compare(opened, opened.network, images) == (60, 0)
    found = compare(opened, lambda batch: opened.network(batch) + 0.5 * (len(batch) == size), images)
    assert found == (60, pytest.approx(0.5))


def test_an_export_for_a_fixed_batch_size_is_refused(opened: OpenModel, digits: Path) -> None:
    def fixed(images: Tensor) -> Tensor:
        if len(images) != 1:
            raise RuntimeError("got invalid dimensions\nfor input: images")
        return opened.network(images)

    with pytest.raises(MapetError, match="cannot be run on 3 images: got invalid dimensions$"):
        compare(opened, fixed, open_images(str(digits)))


def test_a_nan_makes_the_difference_nan(opened: OpenModel, digits: Path) -> None:
    def broken(images: Tensor) -> Tensor:
        output = opened.network(images).clone()
        output[-1, 0] = float("nan") if len(images) == 3 else output[-1, 0]
        return output

    assert math.isnan(compare(opened, broken, open_images(str(digits)))[1])


def test_damaged_images_are_left_out(opened: OpenModel, digits: Path, tmp_path: Path) -> None:
    good = sorted(digits.rglob("*.png"))[:9]
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "list.txt").write_text("\n".join(["broken.png", *map(str, good)]))
    assert compare(opened, opened.network, open_images(str(tmp_path / "list.txt"))) == (9, 0)


def test_the_crop_mode_is_described() -> None:
    opened = OpenModel("flat", nn.Flatten(), VIEW, Reading(1), ())
    assert describe_inputs(opened)["crop_mode"] == "center"
    assert describe_inputs(replace(opened, view=replace(VIEW, squash=True)))["crop_mode"] == "squash"


class Decides(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


class Decomposes(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.svd(images[:, 0])[1]


@pytest.mark.parametrize(
    ("write", "make", "says"),
    [
        (write_torch, Decides, "'model' cannot be exported by torch.export: "),
        (write_onnx, Decides, "'model' cannot be exported by torch.export: "),
        (write_onnx, Decomposes, "'model' cannot be expressed in ONNX: "),
        (write_onnx, lambda: nn.Linear(25_000, 25_000, device="meta"), "take 2.3 GiB, too much for one ONNX file"),
    ],
)
def test_networks_that_cannot_be_exported_are_refused(
    write: Callable[[OpenModel, Path], Exported], make: Callable[[], nn.Module], says: str, tmp_path: Path
) -> None:
    with pytest.raises(MapetError, match=says):
        write(OpenModel("model", make(), VIEW, Reading(1), ()), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
