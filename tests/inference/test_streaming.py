import logging
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mapet import MapetError
from mapet.data.batches import DamageTally
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.inference.models import open_model
from mapet.inference.streaming import stream

VIEW = PlainView((28, 28), (0.5,), (0.25,))
CPU = torch.device("cpu")


def mean(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def run(data: Path, network: Any = mean, **options: Any) -> list[tuple[Tensor, Any]]:
    return list(
        stream(network, open_images(str(data)), VIEW, Reading(1), **{"device": CPU, "batch_size": 7, **options})
    )


@pytest.fixture
def spoilt(digits: Path, tmp_path: Path) -> Path:
    """60 digits of which six are damaged, the first four among them."""
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    files = sorted(folder.rglob("*.png"))
    for index in (0, 1, 2, 3, 20, 59):
        files[index].write_bytes(files[index].read_bytes()[:60])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_images_come_in_order(workers: int, digits: Path) -> None:
    images = open_images(str(digits))
    expected = torch.stack([VIEW(images.load(i, Reading(1)))[1] for i in range(60)])
    index, found = (torch.cat(part) for part in zip(*run(digits, torch.clone, workers=workers), strict=True))
    assert index.tolist() == list(range(60))
    assert found.equal(expected)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 4), (0, 7), (0, 60), (2, 4)])
def test_damaged_images_are_left_out_and_logged_once(
    workers: int, batch_size: int, spoilt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = open_images(str(spoilt))
    tally = DamageTally(images, 0.1)
    with caplog.at_level(logging.WARNING, logger="mapet"):
        parts = run(spoilt, torch.clone, batch_size=batch_size, workers=workers, tally=tally)
    index, found = (torch.cat(part) for part in zip(*parts, strict=True))
    whole = [i for i in range(60) if i not in (0, 1, 2, 3, 20, 59)]
    assert index.tolist() == whole
    assert found.equal(torch.stack([VIEW(images.load(i, Reading(1)))[1] for i in whole]))
    assert all(len(part) for part, _ in parts), "a batch without undamaged images is left out"
    assert tally.indices == {0, 1, 2, 3, 20, 59}
    named = [record.getMessage() for record in caplog.records if "skipped damaged image" in record.getMessage()]
    assert len(named) == 6
    assert sum("class 0/0.png" in line for line in named) == 1


def test_too_many_damaged_images_are_refused(spoilt: Path) -> None:
    images = open_images(str(spoilt))
    with pytest.raises(MapetError, match=r"4 of 60 images cannot be read, the first being 'class 0/0\.png'.*repair"):
        run(spoilt, batch_size=4, tally=DamageTally(images, 0.05))
    for file in spoilt.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(MapetError, match="files drawn in a row cannot be read"):
        run(spoilt)


def test_half_precision_is_close_to_float32(digits: Path, classifier: Path) -> None:
    opened = open_model(classifier, classifier=True)
    images = open_images(str(digits))

    def logits(precision: str) -> Tensor:
        parts = stream(opened.network, images, opened.view, Reading(1), device=CPU, precision=precision)
        return torch.cat([output for _, output in parts])

    exact, half = logits("no"), logits("bf16")
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert not half.float().equal(exact)
    assert torch.allclose(half.float(), exact, atol=0.05 * float(exact.abs().max()))
    assert not exact.requires_grad


def test_batches_are_not_kept_in_memory(digits: Path) -> None:
    inputs: list[weakref.ref[Tensor]] = []
    outputs: list[weakref.ref[Tensor]] = []

    def network(images: Tensor) -> Tensor:
        inputs.append(weakref.ref(images))
        return images + 1

    for _, output in stream(network, open_images(str(digits)), VIEW, Reading(1), device=CPU, batch_size=6):
        outputs.append(weakref.ref(output))
        alive = [sum(ref() is not None for ref in refs) for refs in (inputs, outputs)]
        assert max(alive) <= 2
    assert len(outputs) == 10
