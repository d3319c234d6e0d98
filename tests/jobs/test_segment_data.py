import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mapet import MapetError
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.jobs.segment.config import SegmentConfig
from mapet.jobs.segment.data import IGNORED, MOST_CLASSES, MaskedSet, SegmentationDataset, count_pixels, open_masked

GREY = np.array([[0, 1], [2, 255]], np.uint8)
NO_IMAGES: Any = None


def open_folder(root: Path, **changes: Any) -> tuple[MaskedSet, MaskedSet]:
    return open_masked(SegmentConfig(model="unused", data=str(root), **changes))


def save(path: Path, pixels: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


def make_folder(root: Path, *masks: object) -> Path:
    """Write ``images`` of the sizes of the masks beside ``masks``, without parts."""
    for number, mask in enumerate(masks):
        save(root / "images" / f"{number}.jpg", np.full(np.asarray(mask).shape[:2], 90, np.uint8))
        save(root / "masks" / f"{number}.png", mask)
    return root


@pytest.mark.parametrize(
    "names", [("masks", "train", "val"), ("annotations", "training", "test"), ("Labels", "Train", "validation")]
)
def test_names_of_folders_and_parts(names: tuple[str, str, str], mosaics: Path, tmp_path: Path) -> None:
    folder, *parts = names
    for part, name in zip(("train", "val"), parts, strict=True):
        shutil.copytree(mosaics / "images" / part, tmp_path / "images" / part)
        shutil.copytree(mosaics / "masks" / part, tmp_path / folder / name)
    train, test = open_folder(tmp_path)
    assert (len(train), len(test)) == (48, 12)
    assert train.key(3) == "03.png"
    drawn = np.asarray(Image.open(mosaics / "masks/train/03.png"))
    assert np.array_equal(train.load_mask(3).numpy(), drawn), "only in ADE20K's layout 0 means no class"
    picked = test.subset([5, 1])
    assert [mask.stem for mask in picked.masks] == [Path(key).stem for key in picked.keys] == ["53", "49"]


def test_without_parts_the_seed_holds_out_a_fifth(mosaics: Path, tmp_path: Path) -> None:
    shutil.copytree(mosaics / "images" / "train", tmp_path / "images" / "a" / "b")
    shutil.copytree(mosaics / "masks" / "train", tmp_path / "masks" / "a" / "b")
    train, test = open_folder(tmp_path, seed=1)
    assert (len(train), len(test)) == (38, 10)
    assert not set(train.keys) & set(test.keys)
    assert [mask.stem for mask in test.masks] == [Path(key).stem for key in test.keys]
    assert open_folder(tmp_path, seed=1)[1].keys == test.keys != open_folder(tmp_path, seed=2)[1].keys


def test_ade20k_layout(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        save(tmp_path / "images" / part / "ADE_1.jpg", np.zeros((2, 2, 3), np.uint8))
        save(tmp_path / "annotations" / part / "ADE_1.png", np.array([[0, 1], [150, 255]], np.uint8))
    for part in open_folder(tmp_path):
        assert part.load_mask(0).tolist() == [[IGNORED, 0], [149, IGNORED]]
    kept, _ = open_folder(tmp_path, reduce_zero_label=False, ignore_index=150)
    assert kept.load_mask(0).tolist() == [[0, 1], [IGNORED, 255]]
    counts = count_pixels(kept, Reading(1), 0)
    assert isinstance(counts, torch.Tensor)
    assert torch.nonzero(counts).flatten().tolist() == [0, 1, 255]


def test_palette_16_bit_and_black_and_white_masks(tmp_path: Path) -> None:
    palette = Image.fromarray(GREY, "P")
    palette.putpalette([200, 30, 30] * 256)
    make_folder(tmp_path, GREY, np.array([[0, 700], [2, 255]], np.uint16), np.array([[True, False]]))
    palette.save(tmp_path / "masks" / "0.png")
    ids = {key: part.load_mask(i).tolist() for part in open_folder(tmp_path) for i, key in enumerate(part.keys)}
    assert ids == {"0.jpg": [[0, 1], [2, IGNORED]], "1.jpg": [[0, 700], [2, IGNORED]], "2.jpg": [[1, 0]]}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: shutil.rmtree(root), "is no folder of images with masks; it needs the subfolders"),
        (lambda root: shutil.rmtree(root / "masks"), "is no folder of images with masks"),
        (lambda root: (root / "masks/train/07.png").unlink(), r"'07.png' of .* has no mask .*1 of 48 images"),
        (lambda root: (root / "masks/train/07.png").rename(root / "masks/train/07.jpg"), "'07.png' of .* has no mask"),
        (lambda root: (root / "masks/val").rename(root / "masks/other"), "'val/48.png' of .* has no mask"),
        (lambda root: shutil.copy(root / "masks/train/07.png", root / "masks/train/07.bmp"), "two masks of one name"),
    ],
)
def test_refused_layouts(spoil: Callable[[Path], object], says: str, mosaics: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(mosaics, root)
    spoil(root)
    with pytest.raises(MapetError, match=says):
        open_folder(root)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.zeros((2, 2, 3), np.uint8), r"1\.png is a colour picture.*one channel or a palette"),
        (np.zeros((2, 3), np.uint8), r"1\.png has \(2, 3\) rows and columns, but its image has \(2, 2\)"),
        (np.full((2, 2), MOST_CLASSES, np.uint16), f"has the class {MOST_CLASSES}, but ids end at"),
        (b"no picture", r"mask .*1\.png cannot be read"),
    ],
)
def test_refused_masks(mask: object, says: str, tmp_path: Path) -> None:
    make_folder(tmp_path, GREY, GREY, GREY)
    if isinstance(mask, bytes):
        (tmp_path / "masks" / "1.png").write_bytes(mask)
    else:
        save(tmp_path / "masks" / "1.png", mask)
    with pytest.raises(MapetError, match=says):
        for part in open_folder(tmp_path):
            for index in range(len(part)):
                count_pixels(part, Reading(1), index)


def views(size: tuple[int, int] = (32, 32), **changes: Any) -> SegmentationDataset:
    plain = PlainView(size, (0.2,), (0.5,), interpolation="bilinear")
    return SegmentationDataset(NO_IMAGES, plain, Reading(1), SegmentConfig(model="unused", data="unused", **changes))


def ramp(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return an image and class ids that both tell the column."""
    ids = torch.arange(columns).expand(rows, columns)
    return ids[None] / 255, ids


@pytest.mark.parametrize("changes", [{"mode": "whole"}, {"short_side": 32}, {"short_side": 48}])
def test_image_and_mask_are_cropped_and_flipped_alike(changes: dict[str, Any]) -> None:
    flipped = set()
    for seed in range(12):
        image, ids = views(**changes).random_crop(*ramp(80, 120), seed)
        assert ids.shape == (32, 32)
        assert ids.dtype == torch.long
        columns = (image[0] * 0.5 + 0.2) * 255
        assert (columns - ids)[:, 2:-2].abs().max() <= 2.5, "about the width of one pixel of the crop"
        flipped.add(bool(ids[0, -1] < ids[0, 0]))
    assert flipped == {True, False}


def test_crops_show_no_more_than_a_window_does() -> None:
    """Windows of 32 pixels on an image resized to 96 x 144 show 1 in 13.5 of it: about 64 of 288 columns."""
    crops = [views(short_side=96, crop_min=1, flip=0).random_crop(*ramp(192, 288), seed)[1] for seed in range(20)]
    assert 45 < sum(float(ids[0, -1] - ids[0, 0]) for ids in crops) / 20 < 80


def test_whole_images_are_resized_and_normalised() -> None:
    image = views((28, 28)).whole_image(torch.full((1, 30, 40), 0.7))
    assert torch.allclose(image, torch.tensor(1.0))
    assert image.shape == (1, 28, 37)
    assert views((28, 28), mode="whole").whole_image(ramp(50, 90)[0]).shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("size", "window", "short_side", "expected"),
    [((200, 100), (28, 28), 56, (112, 56)), ((100, 200), (28, 84), 28, (42, 84)), ((100, 200), (28, 28), 7, (28, 56))],
)
def test_no_side_becomes_shorter_than_a_window(size: Any, window: Any, short_side: int, expected: Any) -> None:
    assert views(window, short_side=short_side).evaluated_size(size) == expected
