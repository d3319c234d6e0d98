"""Where images come from: folders, lists of paths, demo sets. All are an ``ImageSet``."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mapet.data.decode import decode, to_channels
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".avif",
        ".tga",
    )
)

TRAIN_FOLDERS, TEST_FOLDERS = ("train", "training"), ("test", "testing", "val", "validation", "valid")


@dataclass(frozen=True)
class ImageSet:
    """Images by index, perhaps with labels.

    Attributes:
        name: what the user called it.
        keys: one string per image that identifies it: its path relative to the set, or its number.
        items: file paths, or ``(n, H, W[, 3])`` uint8 arrays.
        labels: class index per image, or None.
        classes: the names of the classes.
    """

    name: str
    keys: tuple[str, ...]
    items: Sequence[Path] | np.ndarray[Any, np.dtype[np.uint8]]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, channels: int) -> Tensor:
        """Return image ``index`` as ``(channels, H, W)``; see ``mapet.data.decode`` for types and errors."""
        item = self.items[index]
        return decode(item, channels) if isinstance(item, Path) else to_channels(item, channels)

    def digest(self, index: int) -> Tensor:
        """Return the SHA-256 of image ``index``'s content, ``(32,)`` uint8: of its file's bytes, or its pixels."""
        item = self.items[index]
        if isinstance(item, Path):
            if not item.is_file():  # a pipe would be waited for
                raise OSError("missing, or not a regular file")
            with item.open("rb") as file:
                found = hashlib.file_digest(file, "sha256")
        else:
            found = hashlib.sha256(np.ascontiguousarray(item).tobytes())
        return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)

    def load_with_digest(self, index: int, channels: int) -> tuple[Tensor, Tensor]:
        """Return image ``index`` as ``load`` does and the SHA-256 of its content, ``(32,)`` uint8."""
        return self.load(index, channels), self.digest(index)

    def subset(self, indices: Sequence[int]) -> Self:
        """Return the images at ``indices``, in that order."""
        items = self.items[np.asarray(indices)] if isinstance(self.items, np.ndarray) else None
        return replace(
            self,
            keys=tuple(self.keys[i] for i in indices),
            items=items if items is not None else [self.items[i] for i in indices],
            labels=None if self.labels is None else tuple(self.labels[i] for i in indices),
        )

    @property
    def in_memory(self) -> bool:
        """Whether loading costs no reading and decoding of files."""
        return isinstance(self.items, np.ndarray)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the keys in order: changes when images are added, removed or renamed."""
        return hashlib.sha256("\n".join(self.keys).encode(errors="surrogateescape")).hexdigest()


def from_folder(folder: Path) -> ImageSet:
    """All images below a folder, nested as they may be, sorted by path; links to folders are followed."""
    paths = [Path(root) / name for root, name in _walk(folder)]
    if not paths:
        raise MapetError(
            f"folder {folder} holds no image (looked in all its subfolders for {' '.join(sorted(EXTENSIONS))})"
        )
    return ImageSet(str(folder), tuple(path.relative_to(folder).as_posix() for path in paths), paths)


def from_file(file: Path) -> ImageSet:
    """A single image; its name is its key."""
    return ImageSet(str(file), (file.name,), [file])


def from_labelled_folder(folder: Path, least_classes: int = 2) -> ImageSet:
    """The ``ImageFolder`` layout: the first folder below ``folder`` is the class."""
    images = from_folder(folder)
    names = [Path(key).parts[0] if len(Path(key).parts) > 1 else None for key in images.keys]
    if None in names:
        stray = images.keys[names.index(None)]
        raise MapetError(
            f"labelled folder {folder} needs one subfolder per class, but {stray!r} lies outside of any; move it"
        )
    classes = sorted({name for name in names if name is not None})
    if len(classes) < least_classes:
        raise MapetError(f"labelled folder {folder} has the single class {classes[0]!r}; at least 2 are needed")
    index = {name: number for number, name in enumerate(classes)}
    return replace(images, labels=tuple(index[name] for name in names if name is not None), classes=tuple(classes))


def train_and_test(folder: Path) -> tuple[Path, Path] | None:
    """Return the subfolders that hold the training and the test part; None if there are not both."""
    by_name = {child.name.lower(): child for child in folder.iterdir() if child.is_dir()}
    train, test = (
        next((by_name[name] for name in names if name in by_name), None) for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    return None if train is None or test is None else (train, test)


def with_classes(images: ImageSet, classes: Sequence[str], whose: str) -> ImageSet:
    """Number the labels of ``images`` as ``classes`` are numbered, by name.

    Raises:
        MapetError: if an image is of a class that is not among them.
    """
    unknown = sorted(set(images.classes) - set(classes))
    if unknown:
        names = ", ".join(map(repr, unknown[:5]))
        raise MapetError(
            f"{images.name} has images of the class{'es' if len(unknown) > 1 else ''} {names}, which {whose} does not "
            "have; remove or rename the folder"
        )
    index = {name: number for number, name in enumerate(classes)}
    labels = tuple(index[images.classes[label]] for label in _labels(images))
    return replace(images, labels=labels, classes=tuple(classes))


def from_list(file: Path) -> ImageSet:
    """A text file with one image path per line, relative to the file's own folder; ``#`` starts a comment."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise MapetError(
            f"{file} is neither a folder of images, nor an image, nor a text file of paths ({error.reason})"
        ) from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise MapetError(f"list {file} names no image; write one path per line")
    paths = [file.parent / name for name in names]
    # os.path, not pathlib: false, not an error, for a name that no file can have.
    exist = [os.path.isfile(path) for path in paths]  # noqa: PTH113
    missing = next((name for name, found in zip(names, exist, strict=True) if not found), None)
    if missing is not None:
        raise MapetError(
            f"list {file} names {missing[:200]!r}, which does not exist (paths are relative to {file.parent.resolve()})"
        )
    return ImageSet(str(file), tuple(names), paths)


def from_array(
    name: str, images: np.ndarray[Any, np.dtype[np.uint8]], labels: Sequence[int], classes: Sequence[str]
) -> ImageSet:
    """Images that are in memory already, ``(n, H, W[, 3])`` uint8."""
    keys = tuple(str(number) for number in range(len(images)))
    return ImageSet(name, keys, images, tuple(int(label) for label in labels), tuple(classes))


def split(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a labelled set in two, class by class; the second part holds ``share`` of each class.

    Raises:
        MapetError: if that leaves nothing of a class for the first part.
    """
    first: list[int] = []
    second: list[int] = []
    for name, members in _shuffled_classes(images, seed):
        held_out = max(1, round(share * len(members)))
        if held_out >= len(members):
            raise MapetError(
                f"class {name!r} of {images.name} has {len(members)} image(s), too few to hold some out; add images or "
                "remove the class"
            )
        second += members[:held_out]
        first += members[held_out:]
    return images.subset(sorted(first)), images.subset(sorted(second))


def share_per_class(images: ImageSet, share: float, seed: int) -> ImageSet:
    """Take ``share`` of each class, at least one image; with the same seed, more are a superset of fewer."""
    chosen: list[int] = []
    for _, members in _shuffled_classes(images, seed):
        chosen += members[: max(1, round(share * len(members)))]
    return images.subset(sorted(chosen))


def _shuffled_classes(images: ImageSet, seed: int) -> Iterator[tuple[str, list[int]]]:
    """Yield each class's name and the indices of its images in random order."""
    labels = torch.tensor(_labels(images))
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique():
        members = torch.nonzero(labels == label)[:, 0]
        yield images.classes[int(label)], members[torch.randperm(len(members), generator=generator)].tolist()


def few_per_class(images: ImageSet, count: int, seed: int) -> ImageSet:
    """Take ``count`` labelled images of each class; with the same seed, more are a superset of fewer.

    Raises:
        MapetError: if a class has fewer.
    """
    labels = torch.tensor(_labels(images))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = []
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        if len(members) < count:
            raise MapetError(
                f"class {images.classes[int(label)]!r} of {images.name} has {len(members)} image(s), fewer than the "
                f"{count} asked for; take {len(members)} or fewer of each class"
            )
        chosen += members[:count].tolist()
    return images.subset(sorted(chosen))


def _labels(images: ImageSet) -> tuple[int, ...]:
    if images.labels is None:
        raise MapetError(f"{images.name} has no labels; give a folder with one subfolder per class")
    return images.labels


def _warn(error: OSError) -> None:
    logger.warning("skipped folder %s (%s)", error.filename, error.strerror)


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (folder, file name) of all images, sorted by path; each real folder is entered once."""
    seen: set[str] = set()
    found: list[tuple[str, str]] = []
    for root, folders, files in os.walk(folder, onerror=_warn, followlinks=True):
        real = str(Path(root).resolve())
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        found += [
            (root, name) for name in files if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
        ]
    yield from sorted(found)
