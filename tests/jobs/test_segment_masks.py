from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mapet import MapetError
from mapet.data.decode import decode
from mapet.jobs.segment.masks import IGNORED, MOST_CLASSES, count_pixels, open_masked


def save(path: Path, pixels: object, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    if mode is not None:
        image = image.convert(mode)
    image.save(path)
    return path


def folder_of(root: Path, *masks: object) -> Path:
    """``images`` beside ``masks``, without parts; the images have the masks' sizes."""
    for number, mask in enumerate(masks):
        rows, columns = np.asarray(mask).shape[:2]
        save(root / "images" / f"{number}.jpg", np.full((rows, columns), 90, np.uint8))
        save(root / "masks" / f"{number}.png", mask)
    return root


GREY = np.array([[0, 1], [2, 255]], np.uint8)


def test_parts_and_the_masks_of_their_images(mosaics: Path) -> None:
    train, test = open_masked(str(mosaics))
    assert (len(train), len(test)) == (48, 12)
    assert train.keys[3] == "03.png"
    stacked = train.load(3, 2)
    assert stacked.shape == (2, 56, 56)
    assert torch.allclose(stacked[0], decode(mosaics / "images/train/03.png", 1)[0] / 255)
    drawn = np.asarray(Image.open(mosaics / "masks/train/03.png"))
    assert np.array_equal(train.mask(3).numpy(), drawn)
    assert torch.equal(stacked[1], train.mask(3).float())
    picked = test.subset([5, 1])
    assert [mask.stem for mask in picked.masks] == [Path(key).stem for key in picked.keys] == ["53", "49"]


@pytest.mark.parametrize("name", ["annotations", "labels", "Masks"])
def test_other_names_of_folders_and_parts(name: str, mosaics: Path, tmp_path: Path) -> None:
    shutil.copytree(mosaics / "images" / "train", tmp_path / "images" / "training")
    shutil.copytree(mosaics / "images" / "val", tmp_path / "images" / "test")
    shutil.copytree(mosaics / "masks" / "train", tmp_path / name / "Train")
    shutil.copytree(mosaics / "masks" / "val", tmp_path / name / "validation")
    train, test = open_masked(str(tmp_path))
    assert (len(train), len(test)) == (48, 12)
    assert int(train.mask(0).min()) == 0, "only ADE20K's very names mean that 0 is no class"


def test_without_parts_a_fifth_is_held_out_by_the_seed(mosaics: Path, tmp_path: Path) -> None:
    shutil.copytree(mosaics / "images" / "train", tmp_path / "images" / "a" / "b")
    shutil.copytree(mosaics / "masks" / "train", tmp_path / "masks" / "a" / "b")
    train, test = open_masked(str(tmp_path), seed=1)
    assert (len(train), len(test)) == (38, 10)
    assert not set(train.keys) & set(test.keys)
    assert all(mask.stem == Path(key).stem for mask, key in zip(test.masks, test.keys, strict=True))
    assert open_masked(str(tmp_path), seed=1)[1].keys == test.keys
    assert open_masked(str(tmp_path), seed=2)[1].keys != test.keys


def test_ade20k_is_recognised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("training", "validation"):
        save(tmp_path / "images" / part / "ADE_1.jpg", np.zeros((2, 2, 3), np.uint8))
        save(tmp_path / "annotations" / part / "ADE_1.png", np.array([[0, 1], [150, 255]], np.uint8))
    with caplog.at_level(logging.INFO, "mapet"):
        train, test = open_masked(str(tmp_path))
    assert "is laid out as ADE20K" in caplog.text
    assert train.mask(0).tolist() == test.mask(0).tolist() == [[IGNORED, 0], [149, IGNORED]]
    assert train.load(0, 4)[3].tolist() == train.mask(0).tolist()
    kept, _ = open_masked(str(tmp_path), reduce_zero_label=False, ignore_index=None)
    assert kept.mask(0).tolist() == [[0, 1], [150, 255]]


def test_palettes_and_deep_and_two_valued_masks_hold_ids(tmp_path: Path) -> None:
    palette = Image.fromarray(GREY, "P")
    palette.putpalette([200, 30, 30] * 256)
    folder_of(tmp_path, GREY, np.array([[0, 700], [2, 255]], np.uint16), np.array([[True, False]]))
    palette.save(tmp_path / "masks" / "0.png")
    train, test = open_masked(str(tmp_path))
    by_key = {key: part.mask(i).tolist() for part in (train, test) for i, key in enumerate(part.keys)}
    assert by_key == {"0.jpg": [[0, 1], [2, IGNORED]], "1.jpg": [[0, 700], [2, IGNORED]], "2.jpg": [[1, 0]]}


def test_pixels_are_counted_as_numpy_counts_them(mosaics: Path) -> None:
    train, _ = open_masked(str(mosaics), ignore_index=2)
    found = list(count_pixels(train, threads=3))
    for index in (0, 17, 47):
        drawn = np.asarray(Image.open(train.masks[index]))
        expected = np.bincount(drawn.ravel())
        if len(expected) > 2:
            expected[2] = 0
        assert found[index].tolist() == np.trim_zeros(expected, "b").tolist()


def turned(root: Path) -> None:
    """An image stored on its side, as cameras do: its mask has the size that is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(root / "images" / "0.jpg", exif=exif)
    save(root / "masks" / "0.png", np.zeros((4, 2), np.uint8))


def test_the_orientation_of_cameras_is_no_other_size(tmp_path: Path) -> None:
    turned(folder_of(tmp_path, GREY, GREY))
    for part in open_masked(str(tmp_path)):
        for index, _ in enumerate(count_pixels(part)):
            part.load(index, 2)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: shutil.rmtree(root / "masks"), "is no folder of images with masks; it needs the subfolders"),
        (lambda root: shutil.rmtree(root), "is no folder of images with masks"),
        (
            lambda root: (root / "masks/train/07.png").unlink(),
            r"image '07.png' of .*train has no mask .*1 of 48 images",
        ),
        (lambda root: shutil.copy(root / "masks/train/07.png", root / "masks/train/07.bmp"), "are for the same image"),
        (lambda root: (root / "masks/train/07.png").rename(root / "masks/train/07.jpg"), "'07.png' of .* has no mask"),
        (lambda root: (root / "masks/val").rename(root / "masks/other"), "has the parts train and val, but .*masks"),
    ],
)
def test_layouts_that_are_refused(spoil: Callable[[Path], object], says: str, mosaics: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(mosaics, root)
    spoil(root)
    with pytest.raises(MapetError, match=says):
        open_masked(str(root))


def test_folders_without_images_and_with_a_single_one(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(MapetError, match="holds no image"):
        open_masked(str(tmp_path))
    with pytest.raises(MapetError, match="holds a single image; at least 2"):
        open_masked(str(folder_of(tmp_path, GREY)))


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.zeros((2, 2, 3), np.uint8), r"1\.png is a colour picture \(mode RGB\).*one channel or a palette"),
        (np.zeros((2, 2, 4), np.uint8), "mode RGBA"),
        (np.zeros((2, 3), np.uint8), r"1\.jpg has 2 x 2 pixels, but its mask .*1\.png has 2 x 3"),
        (np.full((2, 2), MOST_CLASSES, np.uint16), f"has the class {MOST_CLASSES}; classes are numbered from 0"),
        (b"no picture", r"mask .*1\.png cannot be read"),
    ],
)
def test_masks_that_are_refused(mask: object, says: str, tmp_path: Path) -> None:
    folder_of(tmp_path, GREY, GREY, GREY)
    if isinstance(mask, bytes):
        (tmp_path / "masks" / "1.png").write_bytes(mask)
    else:
        save(tmp_path / "masks" / "1.png", mask)
    with pytest.raises(MapetError, match=says):
        for part in open_masked(str(tmp_path)):
            list(count_pixels(part, threads=2))
