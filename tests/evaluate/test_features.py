from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mapet import MapetError
from mapet.data import PlainView, from_labelled_folder, open_images
from mapet.evaluate import extract_features

VIEW = PlainView((28, 28), (0.5,), (0.5,))


def test_features_are_in_order_and_the_model_keeps_its_mode(digits: Path) -> None:
    images = from_labelled_folder(digits)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    features = extract_features(model, images, VIEW, channels=1, batch_size=7)
    assert model.training
    expected = torch.stack([VIEW(images.load(i, 1))[1].flatten() for i in range(60)])
    assert np.array_equal(features.x, expected.numpy())
    assert features.y.tolist() == list(images.labels or ())


def test_damaged_images_are_left_out(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "d")
    (tmp_path / "d" / "class 4" / "2.png").write_bytes(b"cut")
    features = extract_features(nn.Flatten(), from_labelled_folder(tmp_path / "d"), VIEW, channels=1)
    assert np.bincount(features.y).tolist() == [6, 6, 6, 6, 5, 6, 6, 6, 6, 6]


def test_one_readable_class_is_not_enough(digits: Path, tmp_path: Path) -> None:
    for digit in (3, 4):
        shutil.copytree(digits / f"class {digit}", tmp_path / str(digit))
    for file in (tmp_path / "4").iterdir():
        file.write_bytes(b"cut")
    with pytest.raises(MapetError, match="only 6 of one class can be read"):
        extract_features(nn.Flatten(), from_labelled_folder(tmp_path), VIEW, channels=1)


def test_images_without_labels_are_refused(digits: Path) -> None:
    with pytest.raises(MapetError, match="has no labels"):
        extract_features(nn.Flatten(), open_images(str(digits)), VIEW, channels=1)
