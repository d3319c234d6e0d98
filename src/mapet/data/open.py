"""Opening images by what the user calls them: a folder, a list of paths, a demo set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mapet.data.demo_sets import DEMO_SETS
from mapet.data.sources import (
    EXTENSIONS,
    ImageSet,
    from_file,
    from_folder,
    from_labelled_folder,
    from_list,
    split,
    train_and_test,
    with_classes,
)
from mapet.errors import MapetError, nearest


def open_images(source: str) -> ImageSet:
    """Open images without labels: a folder, an image, a text file of paths, or the name of a demo set.

    Raises:
        MapetError: if there is nothing of that name, or no image in it.
    """
    path = Path(source)
    # os.path, not pathlib: false, not an error, for a name that no file can have.
    if os.path.isdir(path):  # noqa: PTH112
        return from_folder(path)
    if os.path.isfile(path):  # noqa: PTH113
        return from_file(path) if path.suffix.lower() in EXTENSIONS else from_list(path)
    if source in DEMO_SETS:
        return DEMO_SETS[source]()[0]
    raise MapetError(
        f"{source!r} is neither a folder of images, nor an image, nor a text file of paths, nor a demo set "
        f"({', '.join(DEMO_SETS)}){nearest(source, DEMO_SETS)}"
    )


def open_labelled(source: str, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Open labelled images as (training part, test part).

    Args:
        source: a folder with one subfolder per class, perhaps below ``train`` and ``test`` (or ``val``), or
            the name of a demo set. Without such parts a fifth of each class is held out.
        seed: chooses what is held out.

    Raises:
        MapetError: if there are no labels, a single class, or test images of a class that training lacks.
    """
    path = Path(source)
    if not path.is_dir():
        if source in DEMO_SETS:
            return DEMO_SETS[source]()
        raise MapetError(
            f"{source!r} is neither a folder with one subfolder per class nor a demo set ({', '.join(DEMO_SETS)})"
        )
    parts = train_and_test(path)
    if parts is None:
        return split(from_labelled_folder(path), 0.2, seed)
    train, test = parts
    seen = from_labelled_folder(train)
    return seen, with_classes(from_labelled_folder(test, least_classes=1), seen.classes, str(train))


def open_test(source: str, classes: Sequence[str], whose: str) -> ImageSet:
    """Open labelled images to test a classifier on: the test part where there are parts, else all.

    Args:
        source: see ``open_labelled``.
        classes: what the classifier knows; labels are numbered as these are, by name.
        whose: they are, for messages.

    Raises:
        MapetError: if there are no labels, or images of a class that the classifier does not know.
    """
    path = Path(source)
    if not path.is_dir():
        images = open_labelled(source)[1]
    else:
        parts = train_and_test(path)
        images = from_labelled_folder(path if parts is None else parts[1], least_classes=1)
    return with_classes(images, classes, whose)
