"""Opening of image sets by the name that the user gives, with or without labels; random choices by class."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mapet.data.arrays import from_array_file
from mapet.data.demo_sets import read_demo_set
from mapet.data.huggingface import open_split, open_splits
from mapet.data.names import (
    ARRAYS,
    BUCKET,
    DEMO_NAMES,
    EXTENSIONS,
    HUGGING_FACE,
    TABLES,
    check_images,
    check_labelled,
    ending,
    is_folder,
)
from mapet.data.shards import Shards, is_shards, open_shards
from mapet.data.sources import Files, ImageSet, NoImages, from_file, from_folder, from_list
from mapet.data.stores import Bucket
from mapet.errors import MapetError

TRAIN_PARTS, TEST_PARTS = ("train", "training"), ("test", "testing", "val", "validation", "valid")
HELD_OUT = 0.2  # share of each class that is the test part, where the images have no parts of their own


def open_images(source: str) -> ImageSet:
    """Open images, of a source with several parts those of the training part.

    Args:
        source: a folder of images or of tar files, an image, a text file of paths, a tar file or its index, a NumPy
            file, a Parquet or Arrow file, ``s3://BUCKET/PREFIX``, ``hf:NAME``, or the name of a demo set.

    Raises:
        MapetError: if there is nothing of that name, or it contains no image.
    """
    check_images(source)
    path, kind = Path(source), ending(source)
    if is_folder(source):
        try:
            return from_folder(path)
        except NoImages:
            if is_shards(source):
                return open_shards(source)
            raise
    if is_shards(source):
        return open_shards(source)
    if source.startswith(HUGGING_FACE) or kind in TABLES:
        return open_split(source)
    if path.is_file():
        if kind in ARRAYS:
            return from_array_file(path)
        return from_file(path) if kind in EXTENSIONS else from_list(path)
    return open_labelled(source)[0]


def open_labelled(source: str, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Open labelled images as (training part, test part).

    Args:
        source: see ``open_images``. Labels are the first subfolders of folders and of names in tar files, or those
            that the source holds. Parts are folders or splits ``train`` and ``test`` (or ``val``); without them, a
            fifth of each class is held out as test part.
        seed: chooses the images held out.

    Raises:
        MapetError: if there are no labels, a single class, or test images of a class without training images.
    """
    train, *test = _open_parts(source)
    if len(train.classes) == 1:
        raise MapetError(f"labelled data {train.name} has the single class {train.classes[0]!r}; it needs 2 or more")
    if test:
        return train, with_classes(test[0], train.classes, train.name)
    return split(train, HELD_OUT, seed=0 if _is_demo(source) else seed)


def _open_parts(source: str) -> tuple[ImageSet, ...]:
    """Open labelled images: the training and the test part, or all if there are no parts."""
    check_labelled(source)
    if _is_demo(source):
        return read_demo_set(source)
    if is_folder(source):
        parts: Sequence[ImageSet] = [open_images(str(part)) for part in train_and_test(Path(source)) or (source,)]
    elif source.startswith(HUGGING_FACE):
        splits = open_splits(source)
        names = _find_parts(splits)
        parts = [splits[name] for name in names] if names else [open_split(source)]
    elif source.startswith(BUCKET):
        place = source.rstrip("/")
        names = _find_parts(Bucket(place).folders())
        parts = [open_shards(f"{place}/{name}") for name in names] if names else [open_shards(source)]
    else:
        parts = [open_images(source)]
    return tuple(map(labelled, parts))


def _is_demo(source: str) -> bool:
    return source in DEMO_NAMES and not is_folder(source)


def open_test(source: str, classes: Sequence[str], owner: str) -> ImageSet:
    """Open labelled images for testing a classifier: the test part of a source with parts, otherwise all images.

    Args:
        source: see ``open_labelled``.
        classes: the classifier's classes; the labels are numbered in their order.
        owner: what has these classes, for error messages.

    Raises:
        MapetError: if there are no labels, or images of a class that the classifier does not know.
    """
    # A demo set without parts has a fixed test part, on which nobody trains.
    images = open_labelled(source)[1] if _is_demo(source) else _open_parts(source)[-1]
    return with_classes(images, classes, owner)


def labelled(images: ImageSet) -> ImageSet:
    """Return images with labels: their own, or for files and members of tar files the first folder of their names.

    Raises:
        MapetError: if there are none.
    """
    if images.labels is not None:
        return images
    if not isinstance(images.source, Files | Shards):
        raise MapetError(f"{images.name} has no label for each image; name the column of labels, or add labels")
    folders = [key.rpartition("/")[0].partition("/")[0] for key in images.keys]
    if "" in folders:
        stray = images.keys[folders.index("")]
        raise MapetError(
            f"labelled data {images.name} needs one subfolder per class, but {stray!r} lies outside of any; move it"
        )
    classes = tuple(sorted(set(folders)))
    if isinstance(images.source, Shards) and _find_parts(classes):
        raise MapetError(f"{images.name} holds {' and '.join(classes)}; pack each into a folder of its own")
    index = {name: number for number, name in enumerate(classes)}
    return replace(images, labels=tuple(index[name] for name in folders), classes=classes)


def train_and_test(folder: Path) -> tuple[Path, Path] | None:
    """Return the subfolders that hold the training and the test part; None unless both exist."""
    names = _find_parts(child.name for child in folder.iterdir() if child.is_dir())
    return (folder / names[0], folder / names[1]) if names else None


def _find_parts(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the names of the training and the test part among others; None unless there are both."""
    by_name = {name.lower(): name for name in names}
    train, test = (
        next((by_name[name] for name in known if name in by_name), None) for known in (TRAIN_PARTS, TEST_PARTS)
    )
    return None if train is None or test is None else (train, test)


def with_classes(images: ImageSet, classes: Sequence[str], owner: str) -> ImageSet:
    """Renumber the labels of ``images`` in the order of ``classes``.

    Raises:
        MapetError: if ``images`` have a class that is not in ``classes``; ``owner`` is named as what has ``classes``.
    """
    unknown = sorted(set(images.classes) - set(classes))
    if unknown:
        names = ", ".join(map(repr, unknown[:5]))
        raise MapetError(
            f"{images.name} has images of the class{'es' if len(unknown) > 1 else ''} {names}, which {owner} does not "
            "have; remove or rename the folder"
        )
    index = {name: number for number, name in enumerate(classes)}
    labels = tuple(index[images.classes[label]] for label in images.labels or ())
    return replace(images, labels=labels, classes=tuple(classes))


def labels_to_use(images: ImageSet, label_share: float | None, labels_per_class: int | None, seed: int) -> ImageSet:
    """Return a share of each class, a number of images of each class, or (both None) all images."""
    if label_share is not None:
        return images.subset(_draw_share(images, label_share, seed))
    if labels_per_class is not None:
        return few_per_class(images, labels_per_class, seed)
    return images


def split(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a labelled set class by class; the second part gets ``share`` of each class, at least one image.

    Raises:
        MapetError: if the first part would get no image of a class.
    """
    held_out = _draw_share(images, share, seed)
    rest = sorted(set(range(len(images))) - set(held_out))
    first, second = images.subset(rest), images.subset(held_out)
    missing = sorted(set(second.labels or ()) - set(first.labels or ()))
    if missing:
        raise MapetError(
            f"class {images.classes[missing[0]]!r} of {images.name} has {(second.labels or ()).count(missing[0])} "
            "image(s), too few to hold some out; add images or remove the class"
        )
    return first, second


def _draw_share(images: ImageSet, share: float, seed: int) -> list[int]:
    """Draw ``share`` of each class, at least one image; with one seed, a larger share contains each smaller share."""
    labels = torch.tensor(images.labels)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for label in labels.unique():
        members = torch.nonzero(labels == label)[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator)]
        chosen += shuffled[: max(1, round(share * len(members)))].tolist()
    return sorted(chosen)


def few_per_class(images: ImageSet, count: int, seed: int) -> ImageSet:
    """Draw ``count`` images of each class; with one seed, a larger choice contains each smaller choice.

    Raises:
        MapetError: if a class has fewer images.
    """
    labels = torch.tensor(images.labels)
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
