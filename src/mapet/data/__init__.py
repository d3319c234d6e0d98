"""Images: where they come from, how they are decoded, augmented and put into batches."""

from __future__ import annotations

import os
from pathlib import Path

from mapet.data.batches import (
    Batch,
    DamageTally,
    Sample,
    StepSampler,
    ViewDataset,
    at_random,
    collate,
    in_order,
    load_batches,
)
from mapet.data.decode import check_channels, decode, from_pil, to_channels
from mapet.data.demo_sets import DEMO_SETS
from mapet.data.passes import ContentOnly, EveryView, load_passes
from mapet.data.seeds import Draw, Draws, Stream, fold_seed
from mapet.data.sources import (
    EXTENSIONS,
    ImageSet,
    few_per_class,
    from_array,
    from_file,
    from_folder,
    from_labelled_folder,
    from_list,
    split,
    with_classes,
)
from mapet.data.views import PlainView, TrainView, View
from mapet.errors import MapetError, nearest

__all__ = [
    "DEMO_SETS",
    "Batch",
    "ContentOnly",
    "DamageTally",
    "Draw",
    "Draws",
    "EveryView",
    "ImageSet",
    "PlainView",
    "Sample",
    "StepSampler",
    "Stream",
    "TrainView",
    "View",
    "ViewDataset",
    "at_random",
    "check_channels",
    "collate",
    "decode",
    "few_per_class",
    "fold_seed",
    "from_array",
    "from_labelled_folder",
    "from_pil",
    "in_order",
    "load_batches",
    "load_passes",
    "open_images",
    "open_labelled",
    "split",
    "to_channels",
    "with_classes",
]

TRAIN_FOLDERS, TEST_FOLDERS = ("train", "training"), ("test", "testing", "val", "validation", "valid")


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
    parts_by_name = {child.name.lower(): child for child in path.iterdir() if child.is_dir()}
    train, test = (
        next((parts_by_name[name] for name in names if name in parts_by_name), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if train is None or test is None:
        return split(from_labelled_folder(path), 0.2, seed)
    seen = from_labelled_folder(train)
    return seen, with_classes(from_labelled_folder(test, least_classes=1), seen.classes, str(train))
