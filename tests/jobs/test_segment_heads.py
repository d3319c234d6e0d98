from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor, nn

from mapet import MapetError
from mapet.data.batches import DamageTally, StepSampler, ViewDataset, in_order, load_batches
from mapet.data.seeds import Draws
from mapet.inference.models import OpenModel, open_model
from mapet.inference.tokens import read_tokens
from mapet.jobs.segment.heads import (
    HEADS,
    Confusion,
    HeadRecipe,
    build_head,
    masked_cross_entropy,
    patch_maps,
    predict_classes,
    train_head,
)
from mapet.jobs.segment.masks import IGNORED, open_masked
from mapet.jobs.segment.views import MaskedCrop, MaskedWhole


def predictions(opened: OpenModel, head: nn.Module, data: Path, short_side: int | None, **options: Any) -> list[Any]:
    _, test = open_masked(str(data))
    view = MaskedWhole(opened.view.size, short_side, opened.view.mean, opened.view.std)
    batches = load_batches(ViewDataset(test, view, opened.channels + 1), in_order(len(test), 1), 0)
    return list(predict_classes(opened, head, batches, DamageTally(test, 0.0), **options))


def enlarged(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def test_figures_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 5, (4, 30, 40), generator=generator)
    prediction = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth.clamp(min=0), 2)
    prediction[prediction == 4] = 6  # 4 is never predicted, 6 never true, 5 and 7 are neither
    confusion = Confusion(8)
    for one, other in zip(truth, prediction, strict=True):
        confusion.add(one, other)
    known = truth != IGNORED
    true, found = truth[known].numpy(), prediction[known].numpy()
    present = sorted(set(true) | set(found))
    assert confusion.pixel_accuracy == pytest.approx(accuracy_score(true, found))
    assert confusion.miou == pytest.approx(jaccard_score(true, found, labels=present, average="macro"))
    assert [number for number, iou in enumerate(confusion.iou_per_class) if iou is None] == [5, 7]
    own = [iou for iou in confusion.iou_per_class if iou is not None]
    assert own == pytest.approx(jaccard_score(true, found, labels=present, average=None).tolist())


def test_the_loss_is_over_labelled_pixels() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    classes[0, :2] = IGNORED
    expected = F.cross_entropy(logits, classes, ignore_index=IGNORED)
    assert torch.allclose(masked_cross_entropy(logits, classes), expected)
    assert masked_cross_entropy(logits, torch.full_like(classes, IGNORED)) == 0


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "test_vit"])
def test_maps_of_any_timm_network_lie_as_its_features_do(name: str) -> None:
    """ConvNeXt's features are channels first, MambaOut's channels last, a ViT's a sequence."""
    opened = open_model(name, reinit=True, image_size=(96, 64))
    images = torch.randn(2, 3, 96, 64)
    maps = patch_maps(opened, images)
    with torch.no_grad():
        features = opened.network.forward_features(images)
    if name == "test_vit":
        prefix = opened.network.num_prefix_tokens
        features = features[:, prefix:].reshape(2, *maps.shape[-2:], -1).permute(0, 3, 1, 2)
    elif name == "test_mambaout":
        features = features.permute(0, 3, 1, 2)
    assert torch.allclose(maps, features)
    assert maps.shape[-2] * 2 == maps.shape[-1] * 3
    assert build_head("conv", opened, 5, 0).eval()(maps).shape == (2, 5, *maps.shape[-2:])


def test_an_image_of_a_windows_size_is_predicted_whole(exported_vit: Path, mosaics: Path) -> None:
    opened = open_model(exported_vit, image_size=(56, 56))
    head = build_head("conv", opened, 40, 0).eval()  # more classes than are enlarged at a time
    test = open_masked(str(mosaics))[1]
    slid = predictions(opened, head, mosaics, 56, batch_size=5)
    whole = predictions(opened, head, mosaics, None)
    assert [index for index, *_ in slid] == list(range(12))
    for (index, truth, one), (_, _, other) in zip(slid, whole, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(truth, test.mask(index))
        image = (test.load(index, 2)[:-1] - 0.1) / 0.3
        with torch.no_grad():
            logits = enlarged(head(patch_maps(opened, image[None])), (56, 56))
        assert torch.equal(one, logits[0].argmax(dim=0))


def test_overlapping_windows_are_averaged(exported_vit: Path, mosaics: Path) -> None:
    """Windows of 28 pixels, 18 apart at most, on 56: at 0, 18 and, to end at the edge, 28."""
    opened = open_model(exported_vit)
    head = build_head("linear", opened, 4, 0).eval()
    test = open_masked(str(mosaics))[1]
    for index, _, prediction in predictions(opened, head, mosaics, 56, overlap=1 / 3, batch_size=7)[:3]:
        image = (test.load(index, 2)[:-1] - 0.1) / 0.3
        total, count = torch.zeros(4, 56, 56), torch.zeros(56, 56)
        for top in (0, 18, 28):
            for left in (0, 18, 28):
                window = image[None, :, top : top + 28, left : left + 28]
                with torch.no_grad():
                    patches = read_tokens(opened.network, window).patches[0].T.reshape(1, 32, 4, 4)
                    total[:, top : top + 28, left : left + 28] += enlarged(head(patches), (28, 28))[0]
                count[top : top + 28, left : left + 28] += 1
        same = (prediction == (total / count).argmax(dim=0)).float().mean()
        assert same > 0.999  # a tie may fall either way when sums are rounded


def trained(opened: OpenModel, data: Path, kind: str, seed: int, lr: float = 1e-2) -> nn.Module:
    train, _ = open_masked(str(data))
    head = build_head(kind, opened, 4, seed)
    crop = MaskedCrop(opened.view.size, 56, 0.5, 0.0, opened.view.mean, opened.view.std)
    sampler = StepSampler(len(train), 8, seed, 0, 3)
    batches = load_batches(ViewDataset(train, crop, 2, Draws(seed, seed)), sampler, 0)
    train_head(opened, head, batches, HeadRecipe(3, lr, 1e-4, 0.0), DamageTally(train, 0.0))
    return head


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_head_is_its_seeds_alone_and_the_model_is_left_as_it_was(
    kind: str, exported_vit: Path, mosaics: Path
) -> None:
    opened = open_model(exported_vit)
    before = {key: value.clone() for key, value in opened.network.state_dict().items()}
    first = trained(opened, mosaics, kind, seed=0).state_dict()
    torch.rand(7)  # whatever happened before
    again = trained(opened, mosaics, kind, seed=0).state_dict()
    other = trained(opened, mosaics, kind, seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])
    assert not opened.network.training
    assert all(torch.equal(before[key], value) for key, value in opened.network.state_dict().items())


def test_a_loss_that_is_not_finite_is_refused(exported_vit: Path, mosaics: Path) -> None:
    with pytest.raises(MapetError, match=r"the loss became (nan|inf) at step \d; take a lower --lr"):
        trained(open_model(exported_vit), mosaics, "linear", seed=0, lr=1e30)
