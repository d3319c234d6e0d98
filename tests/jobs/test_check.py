from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mapet import MapetError
from mapet.data.open import open_images
from mapet.data.views import PlainView
from mapet.inference.models import OpenModel
from mapet.jobs.export.check import compare


@pytest.fixture
def opened(tiny_vit: Callable[..., Any]) -> OpenModel:
    return OpenModel("tiny", tiny_vit(channels=1).eval(), PlainView((28, 28), (0.5,), (0.5,)), 1, ())


def test_the_same_network_agrees(opened: OpenModel, digits: Path) -> None:
    assert compare(opened, opened.network, open_images(str(digits))) == (60, 0)


@pytest.mark.parametrize("size", [1, 3, 28])
def test_an_export_that_is_wrong_for_one_batch_size_is_found_out(size: int, opened: OpenModel, digits: Path) -> None:
    found = compare(
        opened, lambda images: opened.network(images) + 0.5 * (len(images) == size), open_images(str(digits))
    )
    assert found.images == 60
    assert found.largest_difference == pytest.approx(0.5)


def test_an_export_for_a_fixed_batch_cannot_be_run(opened: OpenModel, digits: Path) -> None:
    def fixed(images: Tensor) -> Tensor:
        if len(images) != 1:
            raise RuntimeError("got invalid dimensions\nfor input: images")
        return opened.network(images)

    with pytest.raises(MapetError, match="cannot be run on 3 images: got invalid dimensions$"):
        compare(opened, fixed, open_images(str(digits)))


def test_one_nan_is_enough(opened: OpenModel, digits: Path) -> None:
    def broken(images: Tensor) -> Tensor:
        output = opened.network(images).clone()
        output[-1, 0] = float("nan") if len(images) == 3 else output[-1, 0]
        return output

    largest = compare(opened, broken, open_images(str(digits))).largest_difference
    assert largest != largest


def test_damaged_images_are_left_out(opened: OpenModel, digits: Path, tmp_path: Path) -> None:
    good = sorted(digits.rglob("*.png"))[:9]
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:60])
    (tmp_path / "list.txt").write_text("\n".join(["broken.png", *map(str, good)]))
    assert compare(opened, opened.network, open_images(str(tmp_path / "list.txt"))) == (9, 0)
