import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from mapet.data.augment import AugmentedView, seeded
from mapet.data.decode import decode
from mapet.data.reading import Reading
from mapet.data.seeds import Draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEW = AugmentedView((48, 64), MEAN, STD, 0.3, 0.5, "rand-m9-mstd0.5-inc1", 0.4, 0.5)


def test_augmentation_equals_timms_transform(photographs: Path) -> None:
    colours = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "mean": MEAN, "std": STD}
    shapes = {"scale": (0.3, 1.0), "hflip": 0.5, "interpolation": "bicubic", "re_prob": 0.5, "re_mode": "pixel"}
    timms = create_transform((48, 64), is_training=True, **colours, **shapes)
    for number, path in enumerate(sorted(photographs.iterdir())[:8]):
        _, student = VIEW(decode(path, Reading(3)), Draw(number, 0))
        with seeded(number):
            torch.testing.assert_close(student, timms(Image.open(path).convert("RGB")), atol=1e-5, rtol=1e-5)


def test_the_draw_decides_and_the_callers_random_state_stays(photographs: Path) -> None:
    image = decode(min(photographs.iterdir()), Reading(3))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    first, again, other = (VIEW(image, Draw(seed, 0))[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_grey_and_deep_images(photographs: Path) -> None:
    grey = replace(VIEW, mean=(0.5,), std=(0.25,), erasing=0.0)
    image = decode(min(photographs.iterdir()), Reading(1))
    student = grey(image, Draw(0, 0))[1]
    assert student.shape == (1, 48, 64)
    deep = grey(image.float() / 255, Draw(0, 0))[1]
    torch.testing.assert_close(student, deep, atol=0.05, rtol=0)  # a step of 8 bits, before normalisation by 1/4
    plain = replace(grey, crop_min=1.0, flip=0.0, policy=None, jitter=0.0, size=tuple(image.shape[1:]))
    torch.testing.assert_close(plain(image, Draw(0, 0))[1], (image / 255 - 0.5) / 0.25)


def test_other_channels_are_cropped_and_jittered(photographs: Path) -> None:
    """Each channel keeps its own values: timm's transforms know grey and RGB only."""
    image = decode(min(photographs.iterdir()), Reading(3))
    five = torch.cat([image, image[:2]])
    view = replace(VIEW, mean=(0.5,) * 5, std=(0.25,) * 5, policy=None, jitter=0.0, erasing=0.0)
    plain = replace(VIEW, mean=(0.5,) * 3, std=(0.25,) * 3, policy=None, jitter=0.0, erasing=0.0)
    found = view(five, Draw(3, 0))[1]
    assert found.shape == (5, 48, 64)
    assert torch.equal(found[:2], found[3:])
    torch.testing.assert_close(found[:3], plain(image, Draw(3, 0))[1], atol=0.05, rtol=0)  # Pillow rounds to 8 bits
    changed = [replace(view, jitter=0.4)(five, Draw(3, colour))[1] for colour in (1, 1, 2)]
    assert torch.equal(changed[0], changed[1])
    assert not torch.equal(changed[0], changed[2])
    assert not torch.equal(changed[0], found)


def test_the_strongest_policy_does_not_fail(photographs: Path) -> None:
    """timm posterises to 0 bits at magnitude 10, which Pillow 13 refuses."""
    image = decode(min(photographs.iterdir()), Reading(3))
    strong = replace(VIEW, policy="rand-m10-n6-inc1", size=(16, 16))
    assert all(strong(image, Draw(seed, 0))[1].isfinite().all() for seed in range(40))
