from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mapet import MapetError
from mapet.data.batches import DamageTally
from mapet.data.labelled import from_labelled_folder
from mapet.data.open import open_images
from mapet.data.views import PlainView
from mapet.probes.features import Features, extract_features, hold_out

VIEW = PlainView((28, 28), (0.5,), (0.5,))
CPU = torch.device("cpu")


def extract(folder: Path, read: Any = None, **more: Any) -> Features:
    return extract_features(read or nn.Flatten(), from_labelled_folder(folder), VIEW, 1, device=CPU, **more)


def test_features_are_in_order_in_memory_or_on_the_disk(digits: Path, tmp_path: Path) -> None:
    images = from_labelled_folder(digits)
    told: list[int] = []
    features = extract(digits, batch_size=25, show=told.append)
    expected = torch.stack([VIEW(images.load(i, 1))[1].flatten() for i in range(60)])
    assert np.array_equal(features.x, expected.numpy())
    assert features.y.tolist() == list(images.labels or ())
    assert told == [25, 50, 60]
    kept = extract(digits, batch_size=25, file=tmp_path / "features")
    assert isinstance(kept.store, np.memmap)
    assert np.array_equal(kept.x, features.x.astype(np.float16))
    part = kept.subset(np.array([7, 3])).subset(np.array([1]))
    assert np.array_equal(part.x, kept.x[3:4])
    assert np.array_equal(part.take(slice(0, 1))[0], kept.x[3:4])


def test_damaged_images_are_left_out_and_named(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(digits, tmp_path / "d")
    (tmp_path / "d" / "class 4" / "2.png").write_bytes(b"cut")
    assert np.bincount(extract(tmp_path / "d").y).tolist() == [6, 6, 6, 6, 5, 6, 6, 6, 6, 6]
    assert "skipped damaged image class 4/2.png" in caplog.text
    tally = DamageTally(from_labelled_folder(tmp_path / "d"), 0.01)
    with pytest.raises(MapetError, match=r"1 of 60 images cannot be read.*--max-damaged"):
        extract(tmp_path / "d", tally=tally)


def test_one_readable_class_is_not_enough(digits: Path, tmp_path: Path) -> None:
    for digit in (3, 4):
        shutil.copytree(digits / f"class {digit}", tmp_path / str(digit))
    for file in (tmp_path / "4").iterdir():
        file.write_bytes(b"cut")
    with pytest.raises(MapetError, match="only 6 of one class can be read"):
        extract(tmp_path)
    assert extract(tmp_path, least_classes=1).y.tolist() == [0] * 6


def test_images_without_labels_are_refused(digits: Path) -> None:
    with pytest.raises(MapetError, match="has no labels"):
        extract_features(nn.Flatten(), open_images(str(digits)), VIEW, 1, device=CPU)


def test_features_that_are_no_numbers_are_refused_with_the_image(digits: Path, tmp_path: Path) -> None:
    images = from_labelled_folder(digits)
    broken = VIEW(images.load(31, 1))[1]

    def read(batch: Tensor) -> Tensor:
        return torch.where((batch == broken).all(dim=(1, 2, 3))[:, None], torch.nan, batch.flatten(1))

    with pytest.raises(MapetError, match=f"features of image '{images.keys[31]}'.*contain NaN"):
        extract(digits, read, batch_size=25)
    with pytest.raises(MapetError, match="contain NaN or infinity"):  # float16 ends at 65504
        extract(digits, lambda batch: 1e5 * batch.flatten(1), file=tmp_path / "features")


def test_a_disk_without_room_is_refused_before_it_is_full(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=r"GiB in the temporary folder .* set TMPDIR"):
        extract(digits, lambda batch: torch.zeros(1).expand(len(batch), 1 << 45), file=tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_a_limit_on_file_sizes_is_met_before_the_work(digits: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(MapetError, match=f"in the temporary folder {tmp_path}, .*File too large.*; set TMPDIR"):
            extract(digits, file=tmp_path / "features")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_fifth_of_every_class_is_held_out() -> None:
    y = np.repeat([0, 1, 2, 3], [50, 10, 5, 1])
    rest, held_out = hold_out(y, seed=3)
    assert sorted([*rest, *held_out]) == list(range(66))
    assert np.bincount(y[held_out]).tolist()[:3] == [10, 2, 1]
    again, other = hold_out(y, seed=3), hold_out(y, seed=4)
    assert np.array_equal(again[1], held_out)
    assert not np.array_equal(other[1], held_out)
    assert [len(part) for part in hold_out(np.array([0, 0, 1, 1]), seed=2**40)] == [2, 2], "one each of small classes"
    with pytest.raises(MapetError, match="single training image"):
        hold_out(np.array([0, 1, 2]), seed=0)
