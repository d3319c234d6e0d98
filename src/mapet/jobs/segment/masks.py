"""Images with a mask of class ids each: folders recognised by their layout, checked before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype

from mapet.data.labelled import train_and_test
from mapet.data.sources import ImageSet, from_folder
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

# Lossless formats only: JPEG would change the ids.
MASK_EXTENSIONS = frozenset((".png", ".tif", ".tiff", ".bmp"))
MASK_FOLDERS = ("masks", "annotations", "labels")
# Grey of 8 or more bits, palettes (their indices, not their colours), and black and white.
ID_MODES = frozenset(("L", "P", "1", "I", "I;16", "I;16L", "I;16B", "I;16N"))
ADE20K_PARTS = tuple(f"{kind}/{part}" for kind in ("images", "annotations") for part in ("training", "validation"))
IGNORED = -1  # what pixels of no class become
MOST_CLASSES = 4096


@dataclass(frozen=True)
class MaskedSet(ImageSet):
    """Images whose pixels are labelled.

    Attributes:
        masks: a file per image, whose pixel values are class ids.
        ignore_index: the value of pixels of no class, or None.
        reduce_zero_label: whether 0 is of no class too, and value ``v`` is class ``v - 1``.
    """

    masks: tuple[Path, ...] = ()
    ignore_index: int | None = 255
    reduce_zero_label: bool = False

    def load(self, index: int, channels: int) -> Tensor:
        """Return ``(channels, H, W)`` float32: image ``index`` in [0, 1] and, as the last channel, its class ids.

        They travel as one tensor, so that whatever takes images takes these.
        """
        image = to_dtype(super().load(index, channels - 1), torch.float32, scale=True)
        return torch.cat([image, self.mask(index)[None].float()])

    def mask(self, index: int) -> Tensor:
        """Return the class ids of image ``index``, ``(H, W)`` int64; ``IGNORED`` where there is none.

        Raises:
            MapetError: if the mask cannot be read, or does not hold ids.
        """
        ids = torch.from_numpy(_read_ids(self.masks[index]).astype(np.int64))
        classes = ids - 1 if self.reduce_zero_label else ids.clone()
        if self.ignore_index is not None:
            classes[ids == self.ignore_index] = IGNORED
        return classes

    def subset(self, indices: Sequence[int]) -> Self:
        """Return the images at ``indices``, in that order."""
        return replace(super().subset(indices), masks=tuple(self.masks[i] for i in indices))


def open_masked(
    source: str, *, ignore_index: int | None = 255, reduce_zero_label: bool | None = None, seed: int = 0
) -> tuple[MaskedSet, MaskedSet]:
    """Open images and their masks as (training part, test part).

    Recognised are ADE20K as its scene parsing challenge has it (``images/training``, ``annotations/training``,
    ``images/validation``, ``annotations/validation``), and ``images`` beside ``masks`` (or ``annotations``,
    ``labels``), with the parts ``train`` and ``val`` (or the like) in both, or without parts: then a fifth is held
    out. An image's mask has its path, but for the extension.

    Args:
        source: the folder.
        ignore_index: see ``MaskedSet``.
        reduce_zero_label: see ``MaskedSet``; None: true for ADE20K, whose 0 is "other", else false.
        seed: chooses what is held out.

    Raises:
        MapetError: if the layout is another, there are no images, or one has no mask.
    """
    root = Path(source)
    folders = {child.name.lower(): child for child in root.iterdir() if child.is_dir()} if root.is_dir() else {}
    masks = next((folders[name] for name in MASK_FOLDERS if name in folders), None)
    if "images" not in folders or masks is None:
        raise MapetError(
            f"{source!r} is no folder of images with masks; it needs the subfolders images and masks (or annotations, "
            "labels), perhaps with train and val in both"
        )
    if reduce_zero_label is None:
        reduce_zero_label = all((root / part).is_dir() for part in ADE20K_PARTS)
        if reduce_zero_label:
            logger.info("%s is laid out as ADE20K: 0 is of no class, 1 and up are classes 0 and up", source)
    settings: dict[str, Any] = {"ignore_index": ignore_index, "reduce_zero_label": reduce_zero_label}
    parts = train_and_test(folders["images"])
    if parts is None:
        return _hold_out(_pair(folders["images"], masks, **settings), seed)
    mask_parts = train_and_test(masks)
    if mask_parts is None:
        raise MapetError(
            f"{folders['images']} has the parts {parts[0].name} and {parts[1].name}, but {masks} does not; sort the "
            "masks into folders of the same names"
        )
    train, test = (_pair(images, its_masks, **settings) for images, its_masks in zip(parts, mask_parts, strict=True))
    return train, test


def _pair(folder: Path, mask_folder: Path, **settings: Any) -> MaskedSet:
    images, masks = from_folder(folder), from_folder(mask_folder)
    found: dict[str, Path] = {}
    for key in masks.keys:
        if Path(key).suffix.lower() in MASK_EXTENSIONS:
            path, name = mask_folder / key, _without_extension(key)
            if name in found:
                raise MapetError(f"masks {found[name]} and {path} are for the same image; remove one of them")
            found[name] = path
    names = [_without_extension(key) for key in images.keys]
    lacking = [key for key, name in zip(images.keys, names, strict=True) if name not in found]
    if lacking:
        raise MapetError(
            f"image {lacking[0]!r} of {folder} has no mask of its name in {mask_folder} "
            f"({' '.join(sorted(MASK_EXTENSIONS))}; {len(lacking)} of {len(images)} images have none); add the masks, "
            "or move such images elsewhere"
        )
    return MaskedSet(images.name, images.source, masks=tuple(found[name] for name in names), **settings)


def _without_extension(key: str) -> str:
    return Path(key).with_suffix("").as_posix()


def _hold_out(masked: MaskedSet, seed: int) -> tuple[MaskedSet, MaskedSet]:
    if len(masked) < 2:
        raise MapetError(f"{masked.name} holds a single image; at least 2 are needed, one of them to test on")
    order = torch.randperm(len(masked), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, round(0.2 * len(masked)))
    return masked.subset(sorted(order[held_out:])), masked.subset(sorted(order[:held_out]))


def _read_ids(path: Path) -> np.ndarray[Any, Any]:
    try:
        with Image.open(path) as opened:
            mask = ImageOps.exif_transpose(opened)
            mask.load()
    except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
        raise MapetError(f"mask {path} cannot be read ({error}); repair it, or remove it and its image") from error
    if mask.mode not in ID_MODES:
        raise MapetError(
            f"mask {path} is a colour picture (mode {mask.mode}), but its pixels must be class ids; save it with one "
            "channel or a palette, each colour replaced by the number of its class"
        )
    return np.asarray(mask)


def count_pixels(masked: MaskedSet, threads: int = 1) -> Iterator[Tensor]:
    """Read every mask, in order, and yield its pixels of each class, ``(classes up to its greatest,)`` int64.

    Args:
        masked: the set.
        threads: that read at a time.

    Raises:
        MapetError: for a mask that cannot be read, is of another size than its image, or whose values are no class ids.
    """
    check: Callable[[int], Tensor] = lambda index: _count(masked, index)  # noqa: E731
    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            yield from pool.map(check, range(len(masked)))
        finally:
            pool.shutdown(cancel_futures=True)  # the first refusal need not wait for the masks after it


def _count(masked: MaskedSet, index: int) -> Tensor:
    ids = masked.mask(index)
    path = masked.path(index)
    assert path is not None
    size = _image_size(path)
    if size is not None and size != tuple(ids.shape):
        raise MapetError(
            f"image {path} has {size[0]} x {size[1]} pixels, but its mask {masked.masks[index]} has "
            f"{ids.shape[0]} x {ids.shape[1]} (rows x columns); they must be of one size"
        )
    wrong = ids[(ids < IGNORED) | (ids >= MOST_CLASSES)]
    if len(wrong):
        raise MapetError(
            f"mask {masked.masks[index]} has the class {int(wrong[0])}; classes are numbered from 0 to "
            f"{MOST_CLASSES - 1} at most: save it with the ids of classes, not of instances, depths or the like"
        )
    return torch.bincount(ids[ids != IGNORED])


def _image_size(path: Path) -> tuple[int, int] | None:
    """Return rows and columns from a file's header; None of a damaged image, which is counted when it is loaded."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap rows and columns
            return image.size if turned else (image.size[1], image.size[0])
    except Exception:  # Pillow's plug-ins raise whatever they like on damaged files
        return None
