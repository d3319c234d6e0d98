import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mapet.data.decode import decode, decode_bytes, read_file
from mapet.data.reading import UNSCALED, Reading

DEEP = np.array([[100, 1100], [2100, 5000]], np.uint16)


def save(array: np.ndarray, path: Path) -> Path:
    Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_a_range_keeps_absolute_values(dtype: type, tmp_path: Path) -> None:
    """The same value becomes the same number in every image; values outside are clipped."""
    stored = save(DEEP.astype(dtype), tmp_path / "deep.tif")
    expected = torch.tensor([[0.0, 0.5], [1.0, 1.0]])
    assert decode(stored, Reading(1, (100, 2100))).equal(expected[None])
    assert decode(stored, Reading(3, (100, 2100))).equal(expected.expand(3, -1, -1))
    assert decode(stored, Reading(1)).max() == 1, "without a range each image is stretched"
    assert decode(stored, Reading(1, UNSCALED)).equal(torch.tensor(DEEP.astype(np.float32))[None])


def test_images_of_8_bits_have_no_range(tmp_path: Path) -> None:
    grey = save(np.array([[0, 128, 255]], np.uint8), tmp_path / "grey.png")
    assert decode(grey, Reading(1, (0, 4095))).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("value_range", [None, (0.0, 1.0)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_damage(value: float, value_range: tuple[float, float], tmp_path: Path) -> None:
    pixels = np.ones((3, 3), np.float32)
    pixels[1, 2] = value
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        decode(save(pixels, tmp_path / "x.tif"), Reading(1, value_range))


def test_values_whose_range_overflows_are_damage(tmp_path: Path) -> None:
    """Stretched, they would become NaN: both ends are finite, and their difference is not."""
    wide = save(np.array([[-3e38, 0, 3e38]], np.float32), tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"from -3e\+38 to 3e\+38 are too far apart"):
        decode(wide, Reading(1))
    assert decode(wide, Reading(1, (0, 1))).tolist() == [[[0, 0, 1]]]


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.webp", "x.gif", "x.bmp", "x.npy"])
def test_too_many_pixels_are_damage_before_they_are_decoded(name: str, tmp_path: Path) -> None:
    pixels = np.zeros((20, 30), np.uint8)
    if name.endswith("npy"):
        np.save(tmp_path / name, pixels)
    else:
        save(pixels, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert decode_bytes(content, Reading(1, max_pixels=600)).shape == (1, 20, 30)
    with pytest.raises(ValueError, match="20 x 30 pixels are more than --max-pixels 599"):
        decode_bytes(content, Reading(1, max_pixels=599))
    with pytest.raises(ValueError, match=rf"{len(content)} bytes are more than --max-bytes {len(content) - 1}"):
        decode_bytes(content, Reading(1, max_bytes=len(content) - 1))


def test_jpegs_of_very_many_scans_are_damage(tmp_path: Path) -> None:
    """A scan of some bytes takes the time of an image: 100 kB of them could take minutes."""
    Image.new("L", (64, 64)).save(tmp_path / "x.jpg", progressive=True)
    content = (tmp_path / "x.jpg").read_bytes()
    assert decode_bytes(content, Reading(1)).shape == (1, 64, 64)
    scan = content[content.rindex(b"\xff\xc4") : -2]
    with pytest.raises(ValueError, match="scans, more than 100"):
        decode_bytes(content[:-2] + scan * 100 + content[-2:], Reading(1))


def test_files_that_never_end_are_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(8 * 2**40)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    said = {
        "sparse.png": "8796093022208 bytes are more than --max-bytes",
        "zero.png": "not a regular",
        "pipe.png": "not",
    }
    if Path("/proc/kmsg").exists():
        (tmp_path / "proc.png").symlink_to("/proc/self/environ")
        said["proc.png"] = "the file is empty"
    for name, reason in said.items():
        with pytest.raises((OSError, ValueError), match=reason):
            read_file(tmp_path / name, 2**30)


def test_a_growing_file_is_read_to_its_first_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(b"x" * 100)
    status = os.fstat

    def then_grow(descriptor: int) -> os.stat_result:
        found = status(descriptor)
        with file.open("ab") as more:
            more.write(b"y" * 10_000)
        return found

    monkeypatch.setattr(os, "fstat", then_grow)
    assert read_file(file, 200) == b"x" * 100
