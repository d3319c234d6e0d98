from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mapet import MapetError
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.statistics import measure_normalisation, measure_range


@pytest.fixture
def stacks(tmp_path: Path) -> Path:
    """Six arrays of four channels: of different levels, the last one the same everywhere; and a damaged file."""
    noise = np.random.default_rng(0)
    for number in range(6):
        values = noise.normal((100, 200, 300, 0), (10, 20, 30, 0), (16, 16, 4)).astype(np.float32)
        values[..., 3] = 50
        np.save(tmp_path / f"{number}.npy", values)
    (tmp_path / "damaged.npy").write_bytes(b"no array")
    return tmp_path


def test_normalisation_is_that_of_all_pixels(stacks: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, reading = open_images(str(stacks)), Reading(4, (0.0, 400.0))
    whole = torch.stack([images.load(number, reading) for number in range(6)])
    found = [measure_normalisation(images, reading, 16, 0.5, 0, workers) for workers in (0, 2)]
    assert found[0] == found[1]
    mean, std = found[0]
    assert mean == pytest.approx(whole.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert std[:3] == pytest.approx(whole.std(dim=(0, 2, 3), correction=0).tolist()[:3], abs=1e-5)
    assert std[3] == 1, "no division by zero"
    assert "channel 3 of" in caplog.text
    assert "damaged.npy" in caplog.text


def test_range_is_that_of_all_stored_values(stacks: Path, tmp_path: Path) -> None:
    images = open_images(str(stacks))
    stored = np.stack([np.load(path) for path in sorted(stacks.glob("?.npy"))])
    assert measure_range(images, Reading(4), 0, 0) == (stored.min(), stored.max())
    (tmp_path / "grey").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "grey" / "x.png")
    with pytest.raises(
        MapetError, match=r"none of 1 sampled images has 1 channel\(s\) of more than 8 bits; leave --value-range out"
    ):
        measure_range(open_images(str(tmp_path / "grey")), Reading(1), 0, 0)
