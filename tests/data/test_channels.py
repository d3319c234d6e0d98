"""Images of other channels than 1 and 3: RGBA, pages and bands of TIFF files, arrays."""

import io
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor

from mapet import MapetError
from mapet.data import tiff
from mapet.data.decode import decode, decode_bytes
from mapet.data.npy import from_array
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.tokenizers.base import with_channels

NOISE = np.random.default_rng(0).integers(0, 4096, (5, 7, 9), np.uint16)  # channels first


def scaled(values: np.ndarray) -> Tensor:
    return torch.tensor(values.astype(np.float32)) / 4095


def npy(array: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array, allow_pickle=True)
    return stored.getvalue()


def test_alpha_is_the_fourth_channel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png", Reading(4)).equal(torch.tensor(pixels).permute(2, 0, 1))
    Image.fromarray(pixels[:, :, :3]).save(tmp_path / "x.jpg", quality=100)
    opaque = decode(tmp_path / "x.jpg", Reading(4))
    assert opaque[3].eq(255).all()
    assert opaque[:3].equal(decode(tmp_path / "x.jpg", Reading(3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_pages_of_a_tiff(dtype: type, count: int, tmp_path: Path) -> None:
    values = (NOISE[:count] % 256).astype(dtype)
    first, *others = map(Image.fromarray, values)
    first.save(tmp_path / "x.tif", save_all=True, append_images=others)
    found = decode(tmp_path / "x.tif", Reading(count, (0, 4095)))
    assert found.equal(torch.tensor(values) if dtype == np.uint8 else scaled(values))
    for wrong in {2, 4, 5} - {count}:
        with pytest.raises(ValueError, match=rf"it has 1 channel\(s\) instead of {wrong}"):
            decode(tmp_path / "x.tif", Reading(wrong))
    with Image.open(tmp_path / "x.tif") as opened:
        grey = np.asarray(opened)
    alone = decode(tmp_path / "x.tif", Reading(1, (0, 4095)))
    assert alone.equal(torch.tensor(grey)[None] if dtype == np.uint8 else scaled(grey)[None]), "the first page"


def test_pages_of_several_sizes_are_no_channels(tmp_path: Path) -> None:
    pages = [Image.fromarray(NOISE[0].astype(np.uint8)), *(Image.new("L", (4, 4)) for _ in range(2))]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert decode(tmp_path / "x.tif", Reading(3)).equal(torch.tensor(NOISE[0].astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("count", [4, 5])
def test_bands_of_a_tiff(planar: str, compression: str | None, count: int) -> None:
    """Four bands of 16 bits are satellite images, of which Pillow would keep the upper 8 bits as RGBA."""
    values = NOISE[:count] if planar == "separate" else np.moveaxis(NOISE[:count], 0, -1)
    stored = io.BytesIO()
    tifffile.imwrite(stored, values, photometric="minisblack", planarconfig=planar, compression=compression)
    assert decode_bytes(stored.getvalue(), Reading(count, (0, 4095))).equal(scaled(NOISE[:count]))
    with pytest.raises(ValueError, match=rf"it has {count} channel\(s\) instead of 7"):
        decode_bytes(stored.getvalue(), Reading(7))
    with pytest.raises(ValueError, match="7 x 9 pixels are more than --max-pixels 60"):
        decode_bytes(stored.getvalue(), Reading(count, max_pixels=60))


def test_a_fourth_band_of_8_bits_is_not_dropped() -> None:
    """Pillow reads RGB and drops a band that is not said to be alpha, such as near infrared."""
    values, stored = (NOISE[:4] % 256).astype(np.uint8), io.BytesIO()
    tifffile.imwrite(stored, np.moveaxis(values, 0, -1), photometric="rgb", extrasamples=["unspecified"])
    assert decode_bytes(stored.getvalue(), Reading(4)).equal(torch.tensor(values))
    assert decode_bytes(stored.getvalue(), Reading(3)).equal(torch.tensor(values[:3]))


def test_colours_of_16_bits_with_a_range() -> None:
    values, stored = np.moveaxis(NOISE[:3], 0, -1), io.BytesIO()
    tifffile.imwrite(stored, values, photometric="rgb")
    assert decode_bytes(stored.getvalue(), Reading(3, (0, 4095))).equal(scaled(NOISE[:3]))
    assert decode_bytes(stored.getvalue(), Reading(3)).equal(torch.tensor((NOISE[:3] >> 8).astype(np.uint8))), "as ever"
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    header = np.array([9, 7], ">u4").tobytes() + bytes([16, 2, 0, 0, 0])  # columns, rows, 16 bits, RGB
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    checked = [(len(content), kind + content, zlib.crc32(kind + content)) for kind, content in parts]
    chunks = [size.to_bytes(4, "big") + chunk + crc.to_bytes(4, "big") for size, chunk, crc in checked]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    assert decode_bytes(png, Reading(3)).equal(torch.tensor((NOISE[:3] >> 8).astype(np.uint8)))
    with pytest.raises(ValueError, match="to which no value range applies"):
        decode_bytes(png, Reading(3, (0, 4095)))


def test_without_tifffile_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = io.BytesIO()
    tifffile.imwrite(stored, NOISE, photometric="minisblack", planarconfig="separate")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"pip install 'mapet\[tiff\]'"):
        tiff.decode_bands(stored.getvalue(), Reading(5))


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<f4", ">f8", "<f2"])
def test_arrays_are_channels_first_or_last(dtype: str) -> None:
    values = (NOISE % 256).astype(dtype)
    expected = torch.tensor(values.astype(np.uint8)) if dtype == "u1" else torch.tensor(values.astype(np.float32)) / 255
    for array in (values, np.moveaxis(values, 0, -1), np.asfortranarray(values)):
        assert decode_bytes(npy(array), Reading(5, (0, 255))).equal(expected)
    assert decode_bytes(npy(values[0]), Reading(3, (0, 255))).equal(expected[:1].expand(3, -1, -1))
    assert from_array(np.moveaxis(values[:3], 0, -1), Reading(1, (0, 255))).shape == (1, 7, 9)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(np.array([[object()]])), "values of type object"),
        (npy(np.zeros((2, 2), complex)), "values of type complex128"),
        (npy(np.zeros(4, np.uint8)), r"the shape \(4,\)"),
        (npy(np.zeros((5, 0, 4), np.uint8)), "0 rows and 4 columns"),
        (npy(np.zeros((4, 4, 4))), r"it has 4 channel\(s\) instead of 5"),
        (npy(np.zeros((5, 4, 4)))[:-1], "639 bytes instead of 640"),
        (npy(np.full((5, 4, 4), 1e300)), "NaN or infinity"),
        (b"\x93NUMPY\x03\x00" + npy(np.zeros((2, 2)))[8:], "another version"),
        (b"\x93NUMPY" + pickle.dumps(print), "version|magic|header"),
    ],
)
def test_other_arrays_are_damage(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_bytes(content, Reading(5))


def test_arrays_are_images_only_where_there_are_no_others(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", NOISE)
    images = open_images(str(tmp_path))
    assert images.keys == ("0.npy", "1.npy", "2.npy")
    assert images.load(1, Reading(5, (0, 4095))).equal(scaled(NOISE))
    Image.new("L", (2, 2)).save(tmp_path / "x.png")
    assert open_images(str(tmp_path)).keys == ("x.png",)


def test_networks_that_read_other_channels_are_refused() -> None:
    images = torch.rand(2, 4, 8, 8)
    assert with_channels(images, 4) is images
    assert with_channels(images[:, :3], 1).shape == (2, 1, 8, 8)
    for wanted in (1, 3, 5):
        with pytest.raises(MapetError, match=rf"images of 4 channel\(s\) cannot be converted to the {wanted}"):
            with_channels(images, wanted)
