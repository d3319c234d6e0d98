from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from mapet import MapetError
from mapet.data.labelled import from_labelled_folder
from mapet.data.open import open_images
from mapet.data.views import PlainView
from mapet.probes.classifier import score_classifier

VIEW = PlainView((32, 32), (0.5,), (0.5,))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        in_chans=1,
        depth=1,
        embed_dim=32,
        num_heads=2,
        num_classes=10,
        drop_path_rate=0.5,
    )


def test_scores_are_those_of_the_logits(network: nn.Module, digits: Path) -> None:
    images = from_labelled_folder(digits)
    found = score_classifier(network.train(), images, VIEW, 1, device=CPU, batch_size=7)
    assert not network.training
    with torch.no_grad():
        logits = network(torch.stack([VIEW(images.load(i, 1))[1] for i in range(60)]))
    labels = torch.tensor(images.labels)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert found.top5 == pytest.approx(float((logits.topk(5).indices == labels[:, None]).any(1).double().mean()))
    assert np.array_equal(found.confusion.sum(1), np.full(10, 6))


def test_damaged_images_are_left_out(network: nn.Module, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "d")
    (tmp_path / "d" / "class 4" / "2.png").write_bytes(b"cut")
    found = score_classifier(network, from_labelled_folder(tmp_path / "d"), VIEW, 1, device=CPU)
    assert found.confusion.sum(1).tolist() == [6, 6, 6, 6, 5, 6, 6, 6, 6, 6]


def test_bad_input_is_named(digits: Path) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(len(images), 10)
            logits[3, 2] = torch.nan
            return logits

    images = from_labelled_folder(digits)
    with pytest.raises(MapetError, match=f"output for image '{images.keys[3]}'.*NaN"):
        score_classifier(Broken(), images, VIEW, 1, device=CPU)
    with pytest.raises(MapetError, match="has no labels"):
        score_classifier(Broken(), open_images(str(digits)), VIEW, 1, device=CPU)
