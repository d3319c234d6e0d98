import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mapet.data.decode import decode, decode_bytes, from_pil
from mapet.data.npy import from_array
from mapet.data.reading import Reading


def ramp(high: int, dtype: type) -> np.ndarray:
    return np.linspace(0, high, 64).reshape(8, 8).astype(dtype)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_grey_and_rgb(tmp_path: Path) -> None:
    grey = save(Image.fromarray(ramp(255, np.uint8)), tmp_path / "grey.png")
    assert decode(grey, Reading(1)).shape == (1, 8, 8)
    assert decode(grey, Reading(3)).shape == (3, 8, 8)
    assert torch.equal(decode(grey, Reading(3))[0], decode(grey, Reading(1))[0])
    colour = Image.new("RGB", (6, 4), (10, 20, 30))
    assert decode(save(colour, tmp_path / "rgb.png"), Reading(3))[:, 0, 0].tolist() == [10, 20, 30]
    assert decode(tmp_path / "rgb.png", Reading(3)).shape == (3, 4, 6)


def test_transparency_is_blended_with_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    assert decode(save(image, tmp_path / "rgba.png"), Reading(3))[:, 0].T.tolist() == [[255, 255, 255], [200, 0, 0]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode(save(grey, tmp_path / "la.png"), Reading(1)).tolist() == [[[255]]]


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([250, 1, 2, 3, 240, 5])
    image.putpixel((1, 0), 1)
    assert decode(save(image, tmp_path / "p.png"), Reading(3))[:, 0].T.tolist() == [[250, 1, 2], [3, 240, 5]]
    transparent = save(image, tmp_path / "pt.png", transparency=1)
    assert decode(transparent, Reading(3))[:, 0].T.tolist() == [[250, 1, 2], [255, 255, 255]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("high", [4095, 65535])
def test_sixteen_bits_are_stretched(tmp_path: Path, suffix: str, high: int) -> None:
    values = ramp(high, np.uint16)
    pixels = decode(save(Image.fromarray(values), tmp_path / f"deep.{suffix}"), Reading(1))
    assert pixels.dtype == torch.float32
    assert torch.allclose(pixels[0], torch.from_numpy(values.astype(np.float32)) / high, atol=1e-4)
    assert decode(tmp_path / f"deep.{suffix}", Reading(3)).shape == (3, 8, 8)


def test_floats_and_integers(tmp_path: Path) -> None:
    expected = torch.from_numpy(ramp(1000, np.float64)).float() / 1000
    for array in (ramp(1000, np.float32) - 500, ramp(100_000, np.int32)):
        assert torch.allclose(
            decode(save(Image.fromarray(array), tmp_path / "x.tif"), Reading(1))[0], expected, atol=1e-3
        )
    flat = save(Image.fromarray(np.full((3, 3), 7, np.float32)), tmp_path / "flat.tif")
    assert torch.equal(decode(flat, Reading(1)), torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="NaN"):
        decode(save(Image.fromarray(np.full((3, 3), np.nan, np.float32)), tmp_path / "nan.tif"), Reading(1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("YCbCr", "jpg"), ("1", "png"), ("LAB", "tif")])
def test_white_is_white_in_other_modes(tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
    white = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode) if mode != "LAB" else None
    image = white or Image.new("LAB", (4, 4), (255, 128, 128))
    pixels = decode(save(image, tmp_path / f"image.{suffix}"), Reading(channels))
    assert pixels.shape == (channels, 4, 4)
    assert pixels.min() >= 250


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter to see it upright
    pixels = decode(save(image, tmp_path / "turned.jpg", exif=exif, quality=100), Reading(3))
    assert pixels.shape == (3, 8, 4)
    assert pixels[:, :4].min() > 200
    assert pixels[:, 4:].max() < 50


@pytest.mark.parametrize("name", ["truncated.png", "text.png", "missing.png", "pipe.png"])
def test_damaged_files_raise(tmp_path: Path, name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    (tmp_path / "truncated.png").write_bytes(save(noise, tmp_path / "a.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises((OSError, SyntaxError)) as raised:
        decode(tmp_path / name, Reading(3))
    assert "BytesIO" not in str(raised.value)


def test_arrays_are_converted_from_array() -> None:
    grey = np.random.default_rng(0).integers(0, 255, (5, 6), np.uint8)
    colour = np.random.default_rng(1).integers(0, 255, (5, 6, 3), np.uint8)
    assert torch.equal(from_array(grey, Reading(1)), torch.tensor(grey)[None])
    assert torch.equal(from_array(grey, Reading(3)), torch.tensor(grey).expand(3, -1, -1))
    assert torch.equal(from_array(colour, Reading(3)), torch.tensor(colour).permute(2, 0, 1))
    as_pillow = torch.from_numpy(np.array(Image.fromarray(colour).convert("L")))
    assert (from_array(colour, Reading(1))[0].int() - as_pillow.int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 40}])
def test_jpegs_have_pillows_pixels(channels: int, mode: str, options: dict[str, int], photographs: Path) -> None:
    """Whichever library decodes them; with every orientation that EXIF knows, and some that it does not."""
    photograph = Image.open(next(photographs.rglob("*.jpg"))).resize((75, 50)).convert(mode)
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = BytesIO()
        photograph.save(stored, "JPEG", exif=exif, **options)
        expected = from_pil(Image.open(BytesIO(stored.getvalue())), Reading(channels))
        assert torch.equal(decode_bytes(stored.getvalue(), Reading(channels)), expected)


def test_cut_jpegs_are_refused_with_pillows_words(photographs: Path) -> None:
    content = next(photographs.rglob("*.jpg")).read_bytes()
    for cut in (len(content) // 2, len(content) - 100):
        with pytest.raises(OSError, match="image file is truncated"):
            decode_bytes(content[:cut], Reading(3))
