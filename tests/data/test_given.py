"""Images given from Python."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import QUIET, TINY
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

import mapet
from mapet import MapetError
from mapet.data.given import given_images
from mapet.data.open import open_images
from mapet.data.reading import Reading


def of(*items: Any) -> Any:
    images = given_images({"data": list(items)})[1]
    assert images is not None
    return images


def test_items_are_images_of_many_types(digits: Path) -> None:
    file = digits / "class 3" / "0.png"
    picture = Image.open(file)
    expected = open_images(str(file)).load(0, Reading(1))
    array = np.asarray(picture)
    for item in (
        picture,
        (picture, 3),
        array,
        np.stack([array] * 3, -1),
        expected,
        expected[0],
        expected / 255,
        expected.expand(3, -1, -1),
    ):
        assert of(item).load(0, Reading(1)).equal(expected)
    deep = Image.fromarray(array.astype(np.uint16) * 100)
    assert of(deep).load(0, Reading(1)).is_floating_point(), "an image of 16 bits keeps them"
    assert of(picture, picture.copy()).keys == ("0", "1")
    assert of(picture).digest(0).equal(of(array).digest(0))


@pytest.mark.parametrize(
    ("item", "reason"), [(expected := torch.randn(1, 4, 4), "outside of"), ({"image": expected}, "an item is a dict")]
)
def test_other_items_are_refused(item: Any, reason: str) -> None:
    with pytest.raises((TypeError, ValueError), match=reason):
        of(item).load(0, Reading(1))


def test_a_run_of_a_data_set_is_resumed_with_it(digits: Path, tmp_path: Path) -> None:
    dataset: Dataset[Any] = ImageFolder(str(digits))
    values = {**TINY, "vocab_size": None, "objective": "mae", "steps": 2, "data": dataset}
    mapet.pretrain(values, tmp_path / "run", console=QUIET)
    with pytest.raises(MapetError, match="'python:ImageFolder' were a data set given from Python; give it again"):
        mapet.pretrain({}, tmp_path / "run", resume=True, console=QUIET)
    with pytest.raises(MapetError, match="'data' changed since the run"):
        mapet.pretrain({"data": Subset(dataset, range(50))}, tmp_path / "run", resume=True)
    assert mapet.pretrain({"data": dataset}, tmp_path / "run", resume=True, console=QUIET).finished


def test_an_image_set_is_taken_as_it_is(digits: Path) -> None:
    part = open_images(str(digits)).subset(range(16))
    assert given_images({"data": part, "steps": 1}) == ({"data": str(digits), "steps": 1}, part)


def test_empty_data_sets_are_refused(tmp_path: Path) -> None:
    for data in ([], TensorDataset(torch.zeros(0, 1, 4, 4))):
        with pytest.raises(MapetError, match="is empty or has no length"):
            mapet.pretrain({**TINY, "data": data}, tmp_path / "run", console=QUIET)
    with pytest.raises(MapetError, match="data = 3"):
        mapet.pretrain({**TINY, "data": 3}, tmp_path / "run", console=QUIET)
