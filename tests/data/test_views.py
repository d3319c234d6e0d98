import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torchvision.transforms import v2

from mapet.data.colour import draw_jitter, jittered
from mapet.data.decode import from_pil
from mapet.data.reading import Reading
from mapet.data.seeds import Draw
from mapet.data.views import PlainView, TrainView

IMAGE = (torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


def make(jitter: float = 0.4, size: int = 32, view_size: int = 32, **changes: float) -> TrainView:
    shape = {"crop_min": 0.3, "flip": 0.5, **changes}
    return TrainView(size, view_size, **shape, jitter=jitter, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_both_outputs_have_the_same_crop_and_flip() -> None:
    for seed in range(10):
        tokenizer_images, images = make(jitter=0.0)(IMAGE, Draw(seed, seed))
        assert tokenizer_images.shape == images.shape == (3, 32, 32)
        assert torch.allclose(images, (tokenizer_images - 0.5) / 0.25)
        jittered = make(jitter=0.4)(IMAGE, Draw(seed, seed))
        assert torch.equal(jittered[0], tokenizer_images)
        assert not torch.allclose(jittered[1], images)


def test_a_loading_process_keeps_eight_bits_and_sends_an_image_once() -> None:
    cut = make().cut(IMAGE, Draw(1, 1))
    assert (cut.tokenizer_image.dtype, cut.tokenizer_image.shape, cut.image.numel()) == (torch.uint8, (3, 32, 32), 0)
    assert torch.allclose(make()(IMAGE, Draw(1, 1))[0], cut.tokenizer_image / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_of_a_batch_is_torchvisions_of_each_image(channels: int) -> None:
    images = torch.rand(40, channels, 9, 13, generator=torch.Generator().manual_seed(0))
    transform = v2.ColorJitter(0.4, 0.4, 0.4)
    drawn = torch.stack([draw_jitter(transform, seed) for seed in range(40)])
    assert len({tuple(steps[:, 0].tolist()) for steps in drawn}) == 6  # every order of the three operations
    expected = []
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        expected.append(transform(image))
    assert (jittered(images, drawn) - torch.stack(expected)).abs().max() < 1e-6
    assert torch.equal(
        torch.cat([jittered(images[:7], drawn[:7]), jittered(images[7:], drawn[7:])]), jittered(images, drawn)
    )


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_jitter_of_other_channels_is_brightness_and_contrast(channels: int) -> None:
    images = torch.rand(3, channels, 9, 13, generator=torch.Generator().manual_seed(0))
    means = images.mean(dim=(1, 2, 3), keepdim=True)
    for kind, expected in ((0, images * 0.8), (1, 0.8 * images + 0.2 * means), (2, images)):
        drawn = torch.tensor([[kind, 0.8], [2, 1.3], [2, 0.7]]).expand(3, -1, -1)
        torch.testing.assert_close(jittered(images, drawn), expected)


def test_views_depend_on_the_seed_only() -> None:
    state = torch.get_rng_state()
    first = make()(IMAGE, Draw(1, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = make()(IMAGE, Draw(1, 1)), make()(IMAGE, Draw(2, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_tokenizer_images_stay_in_range() -> None:
    tokenizer_images, _ = TrainView(28, 28, 0.3, 0.5, 0.0, (0.5,), (0.5,))(torch.rand(1, 40, 40).round(), Draw(0, 0))
    assert 0 <= tokenizer_images.min() <= tokenizer_images.max() <= 1


def test_outputs_have_their_own_sizes() -> None:
    draw = Draw(3, 3)
    large, images = make(jitter=0.0, view_size=64)(IMAGE, draw)
    assert large.shape == (3, 64, 64)
    assert (torch.nn.functional.avg_pool2d(large, 2) - (images * 0.25 + 0.5)).abs().mean() < 0.03
    nothing, alone = make(jitter=0.0, view_size=0)(IMAGE, draw)
    assert nothing.numel() == 0
    assert torch.equal(alone, images)
    alone, nothing = make(jitter=0.0, size=0, view_size=64)(IMAGE, draw)
    assert nothing.numel() == 0
    assert torch.equal(alone, large)


def test_flips_are_drawn_or_given() -> None:
    drawn = {flip: make(flip=flip)(IMAGE, Draw(1, 1))[0] for flip in (0.0, 1.0)}
    assert torch.equal(drawn[0.0].flip(-1), drawn[1.0])
    for flip in (0.0, 1.0):
        assert torch.equal(make(flip=flip)(IMAGE, Draw(1, 1, mirrored=False))[0], drawn[0.0])
        assert torch.equal(make(flip=flip)(IMAGE, Draw(1, 1, mirrored=True))[0], drawn[1.0])


def test_plain_views_show_the_centre() -> None:
    tokenizer_images, images = PlainView((40, 40), (0.5,) * 3, (0.25,) * 3)(IMAGE)
    assert torch.allclose(tokenizer_images, IMAGE[:, :, 8:48].float() / 255)
    assert torch.allclose(images, (tokenizer_images - 0.5) / 0.25)


def test_plain_views_of_long_strips_need_little_memory() -> None:
    strip = torch.zeros(1, 1, 60_000, dtype=torch.uint8)  # 12 GB if resized to 224 rows
    strip[:, :, 29_995:30_005] = 255
    assert PlainView((224, 224), (0.0,), (1.0,))(strip)[0].min() > 0.99


@pytest.mark.parametrize("picture", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(427, 640), (427, 200), (150, 201)])
@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation", "crop_mode"),
    [
        ((224, 224), 0.875, "bicubic", "center"),
        ((224, 224), 1.0, "bilinear", "center"),
        ((192, 256), 0.9, "bicubic", "center"),
        ((256, 192), 1.0, "bicubic", "center"),
        ((192, 256), 0.9, "bicubic", "squash"),
    ],
)
def test_plain_views_equal_timms_transform(
    picture: int, rows: int, columns: int, size: tuple[int, int], crop_pct: float, interpolation: str, crop_mode: str
) -> None:
    photograph = Image.fromarray(load_sample_images().images[picture][:rows, :columns])
    settings = {"crop_pct": crop_pct, "interpolation": interpolation, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    expected = create_transform(input_size=(3, *size), crop_mode=crop_mode, **settings)(photograph)
    found = PlainView(size, squash=crop_mode == "squash", **settings)(from_pil(photograph, Reading(3)))[1]
    levels = ((found - expected) * 255).abs().round()
    # Pillow and torchvision round differently, and clamp differently after the first pass where one side is enlarged
    # and the other is reduced.
    assert levels.mean() < 0.25
    assert (levels > 1).float().mean() < 0.002
    if min(rows, columns) > 300:
        assert levels.max() <= 1
