from __future__ import annotations

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform

from mapet.data.decode import from_pil
from mapet.data.seeds import Draw
from mapet.data.views import PlainView, TrainView

IMAGE = (torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


def make(jitter: float = 0.4, size: int = 32, view_size: int = 32, **changes: float) -> TrainView:
    shape = {"crop_min": 0.3, "flip": 0.5, **changes}
    return TrainView(size, view_size, **shape, jitter=jitter, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_both_outputs_have_the_same_crop_and_flip() -> None:
    for seed in range(10):
        view, student = make(jitter=0.0)(IMAGE, Draw(seed, seed))
        assert view.shape == student.shape == (3, 32, 32)
        assert torch.allclose(student, (view - 0.5) / 0.25)


def test_colour_jitter_is_applied_to_the_images_only() -> None:
    view, student = make(jitter=0.4)(IMAGE, Draw(3, 3))
    plain_view, plain_student = make(jitter=0.0)(IMAGE, Draw(3, 3))
    assert torch.equal(view, plain_view)
    assert not torch.allclose(student, plain_student)


def test_views_depend_on_the_seed_only() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = make()(IMAGE, Draw(1, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = make()(IMAGE, Draw(1, 1)), make()(IMAGE, Draw(2, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_views_stay_in_range_for_floats() -> None:
    deep = torch.rand(1, 40, 40).round()
    view, _ = TrainView(28, 28, 0.3, 0.5, 0.0, (0.5,), (0.5,))(deep, Draw(0, 0))
    assert view.min() >= 0
    assert view.max() <= 1


def test_flip_mirrors() -> None:
    unflipped, _ = make(flip=0.0, crop_min=1.0)(IMAGE[:, :, :40], Draw(0, 0))
    flipped, _ = make(flip=1.0, crop_min=1.0)(IMAGE[:, :, :40], Draw(0, 0))
    assert torch.allclose(flipped, unflipped.flip(-1), atol=1e-6)


def test_plain_views_of_long_strips_show_the_centre() -> None:
    strip = torch.zeros(1, 2, 60_000, dtype=torch.uint8)
    strip[:, :, 29_995:30_005] = 255
    assert PlainView((28, 28), (0.0,), (1.0,))(strip)[0].min() > 0.99


def test_plain_views_of_huge_strips_need_little_memory() -> None:
    strip = torch.zeros(1, 1, 65_000, dtype=torch.uint8)  # 21 GB at 224 rows
    assert PlainView((224, 224), (0.0,), (1.0,))(strip)[0].shape == (1, 224, 224)


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.parametrize(
    "cut",
    [(slice(None), slice(None)), (slice(None), slice(100, 300)), (slice(150), slice(201))],
    ids=["landscape", "portrait", "small"],
)
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation", "crop_mode"),
    [
        ((224, 224), 0.875, "bicubic", "center"),
        ((224, 224), 0.9, "bicubic", "center"),
        ((224, 224), 1.0, "bilinear", "center"),
        ((192, 256), 0.9, "bicubic", "center"),
        ((256, 192), 1.0, "bicubic", "center"),
        ((224, 224), 0.9, "bicubic", "squash"),
        ((192, 256), 1.0, "bicubic", "squash"),
    ],
)
def test_plain_views_equal_timms_transform(
    picture: int, cut: tuple[slice, slice], size: tuple[int, int], crop_pct: float, interpolation: str, crop_mode: str
) -> None:
    photograph = Image.fromarray(load_sample_images().images[picture][cut])
    expected = create_transform(
        input_size=(3, *size),
        crop_pct=crop_pct,
        interpolation=interpolation,
        crop_mode=crop_mode,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )(photograph)
    view = PlainView(size, (0.0,) * 3, (1.0,) * 3, crop_pct, interpolation, crop_mode == "squash")
    found = view(from_pil(photograph, 3))[1]
    levels = ((found - expected) * 255).abs().round()
    # Pillow and torchvision round differently, and clamp differently after the first pass where one side is enlarged
    # and the other is reduced.
    assert levels.mean() < 0.25
    assert (levels > 1).float().mean() < 0.002
    if min(photograph.size) > 300:
        assert levels.max() <= 1


def test_plain_view_shows_the_centre() -> None:
    view, student = PlainView((40, 40), (0.5,) * 3, (0.25,) * 3)(IMAGE)
    assert torch.allclose(view, IMAGE[:, :, 8:48].float() / 255)
    assert torch.allclose(student, (view - 0.5) / 0.25)


def test_tokenizer_images_have_their_own_size() -> None:
    draw = Draw(3, 3)
    large, student = make(jitter=0.0, view_size=64)(IMAGE, draw)
    assert large.shape == (3, 64, 64)
    assert torch.equal(student, make(jitter=0.0)(IMAGE, draw)[1])
    assert (torch.nn.functional.avg_pool2d(large, 2) - (student * 0.25 + 0.5)).abs().mean() < 0.03
    nothing, alone = make(jitter=0.0, view_size=0)(IMAGE, draw)
    assert nothing.numel() == 0
    assert torch.equal(alone, student)
    view, nothing = make(jitter=0.0, size=0, view_size=64)(IMAGE, draw)
    assert nothing.numel() == 0
    assert torch.equal(view, large)


def test_a_given_flip_is_not_drawn() -> None:
    for flip in (0.0, 1.0):
        plain, _ = make(flip=flip)(IMAGE, Draw(1, 1, mirrored=False))
        mirrored, _ = make(flip=flip)(IMAGE, Draw(1, 1, mirrored=True))
        assert torch.equal(plain.flip(-1), mirrored)
        assert torch.equal(plain, make(flip=0.0)(IMAGE, Draw(1, 1))[0])
