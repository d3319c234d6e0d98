"""Damaged images of many formats: each is decoded or named, in bounded time and memory."""

import io
import random
import resource
import time
from collections import Counter

import numpy as np
import pytest
import tifffile
from PIL import Image

from mapet.data.batches import ViewDataset, collate
from mapet.data.reading import Reading
from mapet.data.sources import ImageSet, Source
from mapet.data.views import Cut, PlainView, TrainView

MUTANTS = 700
MAX_PIXELS = 2**22
READINGS = [
    Reading(channels, value_range, max_pixels=MAX_PIXELS)
    for channels, value_range in ((3, None), (1, None), (4, None), (3, (0.0, 4000.0)), (4, (0.0, 4000.0)), (5, None))
]
NUMBERS = (0, 1, 2**16 - 1, 2**16, 20_000, 2**31 - 1, 2**31, 2**32 - 1)
VALUES = (np.nan, np.inf, -3e38, 3e38, 1e-45)


def _pillow(image: Image.Image, form: str, **options: object) -> bytes:
    stored = io.BytesIO()
    image.save(stored, form, **options)  # type: ignore[arg-type]
    return stored.getvalue()


def _tifffile(array: np.ndarray, **options: object) -> bytes:
    stored = io.BytesIO()
    tifffile.imwrite(stored, array, photometric="minisblack", **options)
    return stored.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array)
    return stored.getvalue()


def whole_files() -> dict[str, bytes]:
    noise = np.random.default_rng(0)
    rgba = noise.integers(0, 255, (24, 32, 4), np.uint8)
    rgb, deep = Image.fromarray(rgba[:, :, :3]), rgba[:, :, 0].astype(np.uint16) * 200
    floats = noise.normal(size=(24, 32)).astype(np.float32)
    pages = [Image.fromarray(deep)] * 3
    return {
        "png": _pillow(rgb, "PNG"),
        "png, 16 bits": _pillow(Image.fromarray(deep), "PNG"),
        "png, alpha": _pillow(Image.fromarray(rgba), "PNG"),
        "jpeg": _pillow(rgb, "JPEG"),
        "jpeg, progressive": _pillow(rgb, "JPEG", progressive=True),
        "webp": _pillow(rgb, "WEBP"),
        "webp, lossless": _pillow(Image.fromarray(rgba), "WEBP", lossless=True),
        "tiff": _pillow(rgb, "TIFF"),
        "tiff, 16 bits": _pillow(Image.fromarray(deep), "TIFF"),
        "tiff, floats": _pillow(Image.fromarray(floats), "TIFF"),
        "tiff, pages": _pillow(Image.fromarray(deep), "TIFF", save_all=True, append_images=pages),
        "tiff, bands": _tifffile(rgba.astype(np.uint16), planarconfig="contig"),
        "tiff, planes": _tifffile(noise.normal(size=(5, 24, 32)), planarconfig="separate", compression="zlib"),
        "gif": _pillow(rgb.convert("P"), "GIF"),
        "bmp": _pillow(rgb, "BMP"),
        "npy": _npy(rgba),
        "npy, floats": _npy(floats),
    }


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Change bits, numbers, length and order, mostly where headers are."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place = draw.randrange(min(len(changed), draw.choice((32, 128, 400, 10**6))) or 1)
        kind = draw.randrange(7)
        if kind == 0:
            changed[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            changed[place : place + 4] = draw.choice(NUMBERS).to_bytes(4, draw.choice(("little", "big")))
        elif kind == 2:
            changed[place : place + 4] = np.float32(draw.choice(VALUES)).tobytes()
        elif kind == 3:
            del changed[draw.randrange(len(changed) + 1) :]
        elif kind == 4:
            del changed[place : place + draw.randrange(1, 9)]
        elif kind == 5:
            changed[place:place] = draw.randbytes(draw.randrange(1, 9))
        else:
            other = draw.randrange(len(changed) + 1)
            changed[place : place + 16] = changed[other : other + 16]
    return bytes(changed)


class Mutant(Source):
    def __init__(self, stored: bytes) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return 1

    def key(self, index: int) -> str:
        return "mutant"

    def content(self, index: int, max_bytes: int) -> bytes:
        return self.stored


def _damage(images: ImageSet, reading: Reading) -> Exception | None:
    try:
        images.load(0, reading)
    except Exception as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore")
def test_mutants_are_decoded_or_named() -> None:
    files, draw, outcomes = whole_files(), random.Random(0), Counter[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTANTS):
        name, reading = draw.choice(list(files)), draw.choice(READINGS)
        images = ImageSet("mutants", Mutant(mutate(files[name], draw)))
        began = time.process_time()
        damage = _damage(images, reading)
        assert damage is None or str(damage), f"damage without a reason: {damage!r}"
        outcomes["decoded" if damage is None else "named"] += 1
        if damage is None:
            half = (0.5,) * reading.channels
            for view in (PlainView((16, 16), half, half), TrainView(16, 12, 0.2, 0.5, 0.4, half, half)):
                sample = ViewDataset(images, view, reading)[(0, 0)]
                assert not sample["damaged"]
                cut: Cut = collate([sample])["cut"]
                assert all(part.isfinite().all() for part in view.finish(cut)), f"mutant {number} of {name}"
        assert time.process_time() - began < 5, f"mutant {number} of {name}"
    assert min(outcomes["named"], outcomes["decoded"]) > MUTANTS / 20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**20, "far more than the pixels that the limit allows"
