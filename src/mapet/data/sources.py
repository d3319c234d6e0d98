"""Image sets, and the sources that store their images: files in a folder, a list of files, arrays.

A new storage format is a new class with the methods of ``Source`` and a function that returns an ``ImageSet`` of it.
"""

import hashlib
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from mapet.config.keys import MAX_BYTES
from mapet.data.decode import decode_bytes, read_file
from mapet.data.names import EXTENSIONS, ONE_ARRAY
from mapet.data.npy import from_array
from mapet.data.reading import Reading
from mapet.errors import MapetError

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Stored images, addressed by an index from 0.

    A storage format must provide ``__len__``, ``key`` and ``content``, and ``decode`` if the content is not that of an
    image file. Any exception for a missing or damaged image is allowed.
    """

    in_memory: ClassVar[bool] = False  # whether loading an image needs neither reading nor decoding

    @property
    def start_method(self) -> str | None:
        """Return how processes that load images must be started ("spawn"); None for the system's default."""
        return None

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return the string that identifies an image, for instance its path relative to the source."""

    def content(self, index: int, max_bytes: int) -> bytes:
        """Return the stored bytes of an image; one that has more than ``max_bytes`` should be refused unread."""

    def decode(self, content: bytes, reading: Reading) -> Tensor:
        """Return the image of the given stored bytes as ``(C, H, W)``; see ``mapet.data.decode``."""
        return decode_bytes(content, reading)

    def path(self, index: int) -> Path | None:
        """Return the file that holds this image alone; None if there is no such file."""
        return None


@dataclass(frozen=True)
class Files(Source):
    """Image files.

    Attributes:
        root: the folder that ``names`` are relative to.
        names: the path of each file, which is also the image's key.
    """

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        """Return the path of a file relative to ``root``."""
        return self.names[index]

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.root / self.names[index]

    def content(self, index: int, max_bytes: int) -> bytes:
        """Return the bytes of a file."""
        return read_file(self.path(index), max_bytes)


@dataclass(frozen=True, eq=False)
class Arrays(Source):
    """Images in memory, ``(n, H, W)`` or ``(n, H, W, 3)`` uint8; their keys are "0", "1", ..."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    in_memory: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.pixels)

    def key(self, index: int) -> str:
        """Return the number of an image."""
        return str(index)

    def content(self, index: int, max_bytes: int) -> bytes:
        """Return the pixels of an image as bytes."""
        return bytes(self.pixels[index])

    def decode(self, content: bytes, reading: Reading) -> Tensor:
        """Return the pixels as ``(C, H, W)`` uint8."""
        return from_array(np.frombuffer(content, np.uint8).reshape(self.pixels.shape[1:]), reading)


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images of a source, all or a selection, with optional labels.

    Attributes:
        name: what the user called the set.
        source: where the images are stored.
        labels: the class index of each image of the set, or None.
        classes: the names of the classes.
        indices: the position in ``source`` of each image of the set; None for all images of the source.
    """

    name: str
    source: Source
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    indices: np.ndarray[Any, np.dtype[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    def __repr__(self) -> str:
        of_classes = f" of {len(self.classes)} classes" if self.classes else ""
        return f"{len(self)} images{of_classes} from {self.name}"

    def key(self, index: int) -> str:
        """Return the string that identifies an image; see ``Source``."""
        return self.source.key(self._position(index))

    def path(self, index: int) -> Path | None:
        """Return the file that holds this image alone; None if there is no such file."""
        return self.source.path(self._position(index))

    def content(self, index: int, max_bytes: int = MAX_BYTES) -> bytes:
        """Return the stored bytes of an image; see ``Source``."""
        return self.source.content(self._position(index), max_bytes)

    def load(self, index: int, reading: Reading) -> Tensor:
        """Return an image as ``(C, H, W)``; see ``mapet.data.decode`` for types and errors."""
        return self.source.decode(self.content(index, reading.max_bytes), reading)

    def digest(self, index: int, max_bytes: int = MAX_BYTES) -> Tensor:
        """Return the SHA-256 of an image's stored bytes (a file's bytes, an array's pixels), ``(32,)`` uint8."""
        return _sha256(self.content(index, max_bytes))

    def load_with_digest(self, index: int, reading: Reading) -> tuple[Tensor, Tensor]:
        """Return what ``load`` and ``digest`` return, reading the image's bytes once."""
        content = self.content(index, reading.max_bytes)
        return self.source.decode(content, reading), _sha256(content)

    def subset(self, indices: Sequence[int]) -> Self:
        """Return the images at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            indices=chosen if self.indices is None else self.indices[chosen],
            labels=None if self.labels is None else tuple(self.labels[i] for i in indices),
        )

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The key of each image."""
        return tuple(self.key(index) for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the keys in order: changes when images are added, removed or renamed."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            separator = "\n" if index else ""
            digest.update(f"{separator}{self.key(index)}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _position(self, index: int) -> int:
        return index if self.indices is None else int(self.indices[index])


class NoImages(MapetError):
    """A folder holds no image."""


def from_folder(folder: Path) -> ImageSet:
    """Return all images in a folder and its subfolders, sorted by path; links to folders are followed.

    ``.npy`` files are images only where there are no others: features are often stored beside images.

    Raises:
        NoImages: if there are none.
    """
    names = _find_images(folder, EXTENSIONS) or _find_images(folder, ONE_ARRAY)
    if not names:
        looked_for = " ".join(sorted(EXTENSIONS | ONE_ARRAY))
        raise NoImages(f"folder {folder} holds no image (looked in all its subfolders for {looked_for})")
    return ImageSet(str(folder), Files(folder, names))


def from_file(file: Path) -> ImageSet:
    """Return a single image file as a set; its key is its name."""
    return ImageSet(str(file), Files(file.parent, (file.name,)))


def from_list(file: Path) -> ImageSet:
    """Return the images named by a text file: one path per line, relative to the text file; ``#`` starts a comment.

    Raises:
        MapetError: if the file is not text, names no image, or names a file that does not exist.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise MapetError(
            f"{file} is neither a folder of images, nor an image, nor a text file of paths ({error.reason})"
        ) from error
    names = tuple(line for line in lines if line and not line.startswith("#"))
    if not names:
        raise MapetError(f"list {file} names no image; write one path per line")
    for name in names:
        # os.path, not pathlib: pathlib raises an error for a name that is too long for a file.
        if not os.path.isfile(file.parent / name):  # noqa: PTH113
            raise MapetError(
                f"list {file} names {name[:200]!r}, which does not exist (paths are relative to "
                f"{file.parent.resolve()})"
            )
    return ImageSet(str(file), Files(file.parent, names))


def _find_images(folder: Path, extensions: Collection[str]) -> tuple[str, ...]:
    """Return the relative paths of all such files, sorted by folder, then by name; each real folder is entered once."""
    entered: set[str] = set()
    found: list[tuple[str, str]] = []
    for root, folders, files in os.walk(folder, onerror=_warn, followlinks=True):
        real = str(Path(root).resolve())
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        below = "/".join(Path(root).relative_to(folder).parts)
        images = (name for name in files if Path(name).suffix.lower() in extensions and not name.startswith("."))
        found += [(below, name) for name in images]
    return tuple(f"{below}/{name}".removeprefix("/") for below, name in sorted(found))


def _warn(error: OSError) -> None:
    logger.warning("skipped folder %s (%s)", error.filename, error.strerror)


def _sha256(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
