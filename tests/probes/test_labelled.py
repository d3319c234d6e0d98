import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, top_k_accuracy_score
from torch import Tensor, nn

from mapet import MapetError
from mapet.data.batches import DamageTally
from mapet.data.open import labelled, open_images
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.probes.labelled import (
    Features,
    allocate_on_disk,
    extract_features,
    hold_out,
    score,
    score_classifier,
    summarise,
)

VIEW = PlainView((28, 28), (0.5,), (0.5,))


def extract(folder: Path, network: Any = None, **options: Any) -> Features:
    images = labelled(open_images(str(folder)))
    return extract_features(network or nn.Flatten(), images, VIEW, Reading(1), device=torch.device("cpu"), **options)


def test_features_are_in_order_in_memory_and_on_disk(digits: Path, tmp_path: Path) -> None:
    images = labelled(open_images(str(digits)))
    shown: list[int] = []
    features = extract(digits, batch_size=25, show=shown.append)
    expected = torch.stack([VIEW(images.load(i, Reading(1)))[1].flatten() for i in range(60)])
    assert np.array_equal(features.x, expected.numpy())
    assert features.y.tolist() == list(images.labels or ())
    assert shown == [25, 50, 60]
    on_disk = extract(digits, batch_size=25, file=tmp_path / "features")
    assert isinstance(on_disk.store, np.memmap)
    assert np.array_equal(on_disk.x, features.x.astype(np.float16))
    part = on_disk.subset(np.array([7, 3])).subset(np.array([1]))
    assert np.array_equal(part.x, on_disk.x[3:4])
    assert np.array_equal(part.take(slice(0, 1))[0], on_disk.x[3:4])


def test_damaged_images_are_left_out_and_logged(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(digits, tmp_path / "d")
    (tmp_path / "d" / "class 4" / "2.png").write_bytes(b"cut")
    assert np.bincount(extract(tmp_path / "d").y).tolist() == [6, 6, 6, 6, 5, 6, 6, 6, 6, 6]
    assert "skipped damaged image class 4/2.png" in caplog.text
    tally = DamageTally(labelled(open_images(str(tmp_path / "d"))), 0.01)
    with pytest.raises(MapetError, match=r"1 of 60 images cannot be read.*--max-damaged"):
        extract(tmp_path / "d", tally=tally)


def test_nan_and_float16_overflow_are_refused_with_the_name_of_the_image(digits: Path, tmp_path: Path) -> None:
    images = labelled(open_images(str(digits)))
    broken = VIEW(images.load(31, Reading(1)))[1]

    def network(batch: Tensor) -> Tensor:
        return torch.where((batch == broken).all(dim=(1, 2, 3))[:, None], torch.nan, batch.flatten(1))

    with pytest.raises(MapetError, match=f"output of image '{images.keys[31]}' contains NaN"):
        extract(digits, network, batch_size=25)
    with pytest.raises(MapetError, match="contains NaN or infinity"):  # float16 ends at 65504
        extract(digits, lambda batch: 1e5 * batch.flatten(1), file=tmp_path / "features")


def test_features_that_do_not_fit_on_the_disk_are_refused_before_the_work(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=r"GiB in the temporary folder .* set TMPDIR"):
        allocate_on_disk(tmp_path / "features", (60, 1 << 45))
    assert not (tmp_path / "features").exists()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(MapetError, match=f"in the temporary folder {tmp_path}, .*File too large.*; set TMPDIR"):
            extract(digits, file=tmp_path / "features")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_fifth_of_each_class_is_held_out() -> None:
    y = np.repeat([0, 1, 2, 3], [50, 10, 5, 1])
    rest, held_out = hold_out(y, seed=3)
    assert sorted([*rest, *held_out]) == list(range(66))
    assert np.bincount(y[held_out]).tolist()[:3] == [10, 2, 1]
    assert np.array_equal(hold_out(y, seed=3)[1], held_out)
    assert not np.array_equal(hold_out(y, seed=4)[1], held_out)
    assert [len(part) for part in hold_out(np.array([0, 0, 1, 1]), seed=2**40)] == [2, 2]
    for labels, message in (([0, 1, 2], "single training image"), ([1, 1, 1], "the 3 training images .* one class")):
        with pytest.raises(MapetError, match=message):
            hold_out(np.array(labels), seed=0)


def test_scores_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, logits = rng.integers(0, 8, 300), rng.normal(size=(300, 8))
    logits[np.arange(300), truth] += 1
    predicted = logits.argmax(1)
    scores = score(truth, (-logits).argsort(axis=1)[:, :5], [f"c{i}" for i in range(8)])
    assert scores.accuracy == accuracy_score(truth, predicted)
    assert scores.top5 == pytest.approx(top_k_accuracy_score(truth, logits, k=5))
    assert np.array_equal(scores.confusion, confusion_matrix(truth, predicted))
    assert summarise([scores])["per_class"]["c3"] == pytest.approx((predicted == 3)[truth == 3].mean())


def test_no_accuracy_for_a_class_without_images_and_no_top5_for_few_classes() -> None:
    scores = score(np.array([0, 0, 2]), np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0]]), ["a", "b", "c"])
    assert summarise([scores])["per_class"] == {"a": 0.5, "b": None, "c": 1.0}
    assert scores.top5 is None


def test_scores_are_those_of_the_logits_without_damaged_images(digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"img_size": 32, "in_chans": 1, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
    network = timm.create_model("vit_tiny_patch16_224", **small, drop_path_rate=0.5).train()
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    (folder / "class 4" / "2.png").write_bytes(b"cut")
    images = labelled(open_images(str(folder)))
    view = PlainView((32, 32), (0.5,), (0.5,))
    found = score_classifier(network, images, view, Reading(1), device=torch.device("cpu"), batch_size=7)
    assert not network.training
    kept = [i for i, key in enumerate(images.keys) if key != "class 4/2.png"]
    with torch.no_grad():
        logits = network(torch.stack([view(images.load(i, Reading(1)))[1] for i in kept]))
    labels = torch.tensor(images.labels)[kept]
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert found.top5 == pytest.approx(float((logits.topk(5).indices == labels[:, None]).any(1).double().mean()))
    assert found.confusion.sum(1).tolist() == [6, 6, 6, 6, 5, 6, 6, 6, 6, 6]
