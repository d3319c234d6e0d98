from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor
from torch.utils.data import DataLoader

from mapet import MapetError
from mapet.data.batches import StepSampler, in_order
from mapet.data.reading import Reading
from mapet.inference.models import open_model
from mapet.inference.tokens import read_tokens
from mapet.jobs.segment.config import SegmentConfig
from mapet.jobs.segment.data import IGNORED, SegmentationDataset, open_masked
from mapet.jobs.segment.heads import Segmenter, build_head, masked_cross_entropy, predict_classes, train_head
from mapet.jobs.segment.results import Confusion
from mapet.report.progress import Meter


def make_segmenter(
    model: Path, data: Path, size: int = 28, *, kind: str = "linear", classes: int = 4, seed: int = 0, **changes: Any
) -> Segmenter:
    config = SegmentConfig(model=str(model), data=str(data), **changes)
    opened = open_model(model, image_size=(size, size))
    return Segmenter(opened, build_head(kind, 32, classes, seed).eval(), config)


def predict(segmenter: Segmenter) -> list[tuple[int, Tensor, Tensor]]:
    test = open_masked(segmenter.config)[1]
    dataset = SegmentationDataset(test, segmenter.opened.view, Reading(1), segmenter.config)
    return list(predict_classes(segmenter, DataLoader(dataset, batch_sampler=in_order(len(test), 1))))


def train(segmenter: Segmenter, seed: int = 0) -> dict[str, Tensor]:
    images = open_masked(segmenter.config)[0]
    dataset = SegmentationDataset(images, segmenter.opened.view, Reading(1), segmenter.config, seed)
    loader = DataLoader(dataset, batch_sampler=StepSampler(len(images), 8, seed, 0, 3))
    train_head(segmenter, loader, 3, Meter(Console(quiet=True), "training", 3))
    return segmenter.head.state_dict()


def test_metrics_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 5, (2, 30, 40), generator=generator)
    prediction = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth.clamp(min=0), 5)
    confusion = Confusion(7)  # class 5 is never true, class 6 is neither true nor predicted
    for pair in zip(truth, prediction, strict=True):
        confusion.add(*pair)
    known = truth != IGNORED
    expected = jaccard_score(truth[known], prediction[known], average=None).tolist()
    assert confusion.iou_per_class == [*map(pytest.approx, expected), None]
    assert confusion.miou == pytest.approx(sum(expected) / 6)
    assert confusion.pixel_accuracy == pytest.approx(accuracy_score(truth[known], prediction[known]))


def test_loss_is_the_mean_over_labelled_pixels() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    masks[0, :2] = IGNORED
    assert torch.allclose(masked_cross_entropy(logits, masks), F.cross_entropy(logits, masks, ignore_index=IGNORED))
    assert masked_cross_entropy(logits, torch.full_like(masks, IGNORED)) == 0


@pytest.mark.parametrize(
    ("size", "options", "starts"),
    [(56, {}, (0,)), (56, {"mode": "whole"}, (0,)), (28, {"short_side": 56, "overlap": 1 / 3}, (0, 18, 28))],
)
def test_overlapping_windows_are_averaged(
    size: int, options: dict[str, Any], starts: tuple[int, ...], exported_vit: Path, mosaics: Path
) -> None:
    """Windows of 28 pixels, at most 18 apart, on 56 pixels begin at 0, 18 and, to end at the edge, 28."""
    segmenter = make_segmenter(exported_vit, mosaics, size, classes=40, batch_size=5, **options)
    test = open_masked(segmenter.config)[1]
    predicted = predict(segmenter)
    assert [index for index, *_ in predicted] == list(range(12))
    for index, truth, prediction in predicted[:3]:
        image = (test.load(index, Reading(1))[None] / 255 - 0.1) / 0.3
        total, count = torch.zeros(40, 56, 56), torch.zeros(56, 56)
        for top, left in product(starts, starts):
            here = (..., slice(top, top + size), slice(left, left + size))
            with torch.no_grad():
                patches = read_tokens(segmenter.opened.network, image[here]).patches
                logits = segmenter.head(patches.transpose(1, 2).unflatten(2, (size // 7, size // 7)))
            total[here] += F.interpolate(logits, (size, size), mode="bilinear")[0]
            count[here] += 1
        assert torch.equal(truth, test.load_mask(index))
        agreement = (prediction == (total / count).argmax(dim=0)).float().mean()
        assert agreement > 0.999, "rounding may decide ties"


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_training_depends_on_the_seed_alone_and_leaves_the_model(kind: str, exported_vit: Path, mosaics: Path) -> None:
    segmenter = make_segmenter(exported_vit, mosaics, kind=kind)
    before = {key: value.clone() for key, value in segmenter.opened.network.state_dict().items()}
    first = train(segmenter)
    torch.rand(7)  # changes the global random state
    again = train(make_segmenter(exported_vit, mosaics, kind=kind))
    other = train(make_segmenter(exported_vit, mosaics, kind=kind, seed=1), seed=1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])
    assert all(torch.equal(before[key], value) for key, value in segmenter.opened.network.state_dict().items())
    assert not segmenter.opened.network.training
    assert not segmenter.head.training


def test_a_loss_that_is_not_finite_is_refused(exported_vit: Path, mosaics: Path) -> None:
    segmenter = make_segmenter(exported_vit, mosaics)
    config = segmenter.config.model_copy(update={"lr": 1e30, "warmup": 0.0})
    with pytest.raises(MapetError, match=r"the loss became (nan|inf) at step \d; take a lower --lr"):
        train(Segmenter(segmenter.opened, segmenter.head, config))
