"""Images with masks of class ids: recognising the layout of a folder, reading and checking masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mapet.data.labelled import train_and_test
from mapet.data.sources import ImageSet, from_folder
from mapet.errors import MapetError
from mapet.jobs.segment.config import SegmentConfig

MASK_FOLDERS = ("masks", "annotations", "labels")
MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")  # lossless formats: JPEG would change the ids
ADE20K_PARTS = ("images/training", "images/validation", "annotations/training", "annotations/validation")
IGNORED = -1  # class id of pixels without a class
MOST_CLASSES = 4096


@dataclass(frozen=True)
class MaskedSet(ImageSet):
    """Images with one mask each.

    Attributes:
        masks: a file per image, whose pixel values are class ids.
        ignore_index: the value of pixels without a class, or None.
        reduce_zero_label: whether value 0 means no class too, and value ``v`` means class ``v - 1``.
    """

    masks: tuple[Path, ...] = ()
    ignore_index: int | None = 255
    reduce_zero_label: bool = False

    def load_mask(self, index: int) -> Tensor:
        """Return the class ids of image ``index``, ``(H, W)`` int64; ``IGNORED`` for pixels without a class.

        Raises:
            MapetError: if the mask cannot be read, or is a colour picture.
        """
        values = _read_values(self.masks[index])
        ids = values - 1 if self.reduce_zero_label else values
        return ids if self.ignore_index is None else ids.masked_fill(values == self.ignore_index, IGNORED)

    def subset(self, indices: Sequence[int]) -> Self:
        """Return the images at ``indices``, in that order."""
        return replace(super().subset(indices), masks=tuple(self.masks[i] for i in indices))


def open_masked(config: SegmentConfig) -> tuple[MaskedSet, MaskedSet]:
    """Open images and their masks as (training part, test part).

    Two layouts are recognised: that of ADE20K's scene parsing challenge (``images/training``, ``images/validation``,
    ``annotations/training``, ``annotations/validation``), and ``images`` beside ``masks`` (or ``annotations``,
    ``labels``). The latter have the parts ``train`` and ``val`` (or the like) in both; without parts a fifth of the
    images is held out. The mask of an image has the path of the image, with another extension.

    Raises:
        MapetError: if the layout is another, there are no images, or an image has no mask.
    """
    root = Path(config.data)
    folders = {child.name.lower(): child for child in root.iterdir() if child.is_dir()} if root.is_dir() else {}
    images, masks = folders.get("images"), next((folders[name] for name in MASK_FOLDERS if name in folders), None)
    if images is None or masks is None:
        raise MapetError(f"{config.data!r} is no folder of images with masks; it needs the subfolders images and masks")
    reduce_zero_label = config.reduce_zero_label
    if reduce_zero_label is None:
        reduce_zero_label = all((root / part).is_dir() for part in ADE20K_PARTS)
    meaning = {"ignore_index": config.ignore_index, "reduce_zero_label": reduce_zero_label}
    image_parts, mask_parts = train_and_test(images), train_and_test(masks)
    if image_parts is None or mask_parts is None:
        return _hold_out(_pair(images, masks, meaning), config.seed)
    return _pair(image_parts[0], mask_parts[0], meaning), _pair(image_parts[1], mask_parts[1], meaning)


def _pair(folder: Path, mask_folder: Path, meaning: dict[str, Any]) -> MaskedSet:
    images = from_folder(folder)
    mask_keys = [key for key in from_folder(mask_folder).keys if key.lower().endswith(MASK_EXTENSIONS)]
    found = {Path(key).with_suffix(""): mask_folder / key for key in mask_keys}
    if len(found) < len(mask_keys):
        raise MapetError(f"{mask_folder} has two masks of one name with different extensions; remove one of them")
    lacking = [key for key in images.keys if Path(key).with_suffix("") not in found]
    if lacking:
        raise MapetError(
            f"image {lacking[0]!r} of {folder} has no mask of its name in {mask_folder} ({' '.join(MASK_EXTENSIONS)}; "
            f"{len(lacking)} of {len(images)} images have none); add the masks, or move such images elsewhere"
        )
    masks = tuple(found[Path(key).with_suffix("")] for key in images.keys)
    return MaskedSet(images.name, images.source, masks=masks, **meaning)


def _hold_out(masked: MaskedSet, seed: int) -> tuple[MaskedSet, MaskedSet]:
    order = torch.randperm(len(masked), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, round(0.2 * len(masked)))
    return masked.subset(sorted(order[held_out:])), masked.subset(sorted(order[:held_out]))


def _read_values(path: Path) -> Tensor:
    try:
        with Image.open(path) as opened:
            values = np.asarray(ImageOps.exif_transpose(opened))  # of a palette the indices, not the colours
    except Exception as error:  # Pillow's plug-ins raise any exception for damaged files
        raise MapetError(f"mask {path} cannot be read ({error}); repair it, or remove it and its image") from error
    if values.ndim != 2:
        raise MapetError(
            f"mask {path} is a colour picture, but its pixels must be class ids; save it with one channel or a palette"
        )
    return torch.from_numpy(values.astype(np.int64))


def count_pixels(masked: MaskedSet, index: int) -> Tensor | str:
    """Check an image and its mask; return the mask's number of pixels of each class, ``(greatest class + 1,)`` int64.

    Returns:
        the counts, or the reason why the image cannot be read.

    Raises:
        MapetError: if the mask cannot be read, has another size than its image, or holds values that are no class ids.
    """
    mask, ids = masked.masks[index], masked.load_mask(index)
    wrong = ids[(ids < IGNORED) | (ids >= MOST_CLASSES)]
    if len(wrong):
        raise MapetError(
            f"mask {mask} has the class {int(wrong[0])}, but ids end at {MOST_CLASSES - 1}; save it with ids of classes"
        )
    try:
        size = masked.load(index, 1).shape[1:]
    except Exception as error:  # Pillow's plug-ins raise any exception for damaged files
        return f"{type(error).__name__}: {error}"
    if size != ids.shape:
        raise MapetError(f"mask {mask} has {tuple(ids.shape)} rows and columns, but its image has {tuple(size)}")
    return torch.bincount(ids[ids != IGNORED])
