from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapet import MapetError
from mapet.data.open import open_images, open_labelled
from mapet.data.reading import Reading
from mapet.data.sources import Arrays

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 5, 6, 3), np.uint8)


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., 0]])
def test_an_npy_file_is_mapped(pixels: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", pixels)
    images = open_images(str(tmp_path / "x.npy"))
    assert isinstance(images.source, Arrays)
    assert isinstance(images.source.pixels, np.memmap)
    assert images.keys == tuple(map(str, range(20)))
    assert (
        images.load(7, Reading(3)).numpy().transpose(1, 2, 0).tolist()
        == np.broadcast_to(pixels[7].reshape(5, 6, -1), (5, 6, 3)).tolist()
    )
    with pytest.raises(MapetError, match="has no label for each image"):
        open_labelled(str(tmp_path / "x.npy"))


@pytest.mark.parametrize(("labels", "classes"), [(np.arange(20) % 2 * 7, ("0", "7")), (list("ba") * 10, ("a", "b"))])
def test_an_npz_file_has_labels(labels: Any, classes: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("images", "x"):
        np.savez(tmp_path / "x.npz", **{name: PIXELS, "labels": labels})
        train, test = open_labelled(str(tmp_path / "x.npz"))
        assert (len(train), len(test), train.classes) == (16, 4, classes)
        assert [train.classes[label] for label in train.labels or ()] == [str(labels[int(key)]) for key in train.keys]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": np.array([{}], object)}, "cannot be read as NumPy arrays"),
        ({"images": PIXELS / 255}, r"is float64 \(20, 5, 6, 3\); images are uint8"),
        ({"images": PIXELS[..., :2]}, r"is uint8 \(20, 5, 6, 2\)"),
        ({"images": PIXELS[:0]}, "holds no image"),
        ({"a": PIXELS, "b": PIXELS}, "has the arrays a, b; call that of the images 'images'"),
        ({"images": PIXELS, "labels": np.zeros(19, int)}, r"'labels' of .* must be whole numbers or text, \(20,\)"),
    ],
)
def test_other_arrays_are_refused(arrays: dict[str, Any], reason: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(MapetError, match=reason):
        open_images(str(tmp_path / "x.npz"))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for name in ("x.npy", "x.npz"):
        (tmp_path / name).write_bytes(b"\x93NUMPY no array")
        with pytest.raises(MapetError, match="cannot be read as NumPy arrays"):
            open_images(str(tmp_path / name))
