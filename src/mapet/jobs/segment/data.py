"""Images with masks of class ids: layout of a folder, checks, crops for training, whole images for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from mapet.config.keys import MAX_BYTES
from mapet.data.augment import seeded
from mapet.data.batches import SampleKey
from mapet.data.decode import read_file
from mapet.data.open import train_and_test
from mapet.data.reading import Reading
from mapet.data.seeds import Stream, fold_seed, name_number
from mapet.data.sources import ImageSet, from_folder
from mapet.data.views import PlainView
from mapet.data.workers import one_thread
from mapet.errors import MapetError
from mapet.jobs.segment.config import SegmentConfig

# Collated samples of SegmentationDataset: images (B, C, h, w) float32, masks (B, H, W) int64, index (B,).
Batch = dict[str, Tensor]

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
        path = self.masks[index]
        try:
            with Image.open(BytesIO(read_file(path, MAX_BYTES))) as opened:
                pixels = np.asarray(ImageOps.exif_transpose(opened))  # of a palette the indices, not the colours
        except Exception as error:  # Pillow's plug-ins raise any exception for damaged files
            raise MapetError(f"mask {path} cannot be read ({error}); repair it, or remove it and its image") from error
        if pixels.ndim != 2:
            raise MapetError(
                f"mask {path} is a colour picture, but its pixels must be class ids; save it with one channel or a "
                "palette"
            )
        values = torch.from_numpy(pixels.astype(np.int64))
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
        masked = _pair(images, masks, meaning)
        order = torch.randperm(len(masked), generator=torch.Generator().manual_seed(config.seed)).tolist()
        held_out = max(1, round(0.2 * len(masked)))
        return masked.subset(sorted(order[held_out:])), masked.subset(sorted(order[:held_out]))
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


def count_pixels(masked: MaskedSet, reading: Reading, index: int) -> Tensor | str:
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
        size = masked.load(index, reading).shape[1:]
    except Exception as error:  # Pillow's plug-ins raise any exception for damaged files
        return f"{type(error).__name__}: {error}"
    if size != ids.shape:
        raise MapetError(f"mask {mask} has {tuple(ids.shape)} rows and columns, but its image has {tuple(size)}")
    return torch.bincount(ids[ids != IGNORED])


@dataclass(frozen=True)
class SegmentationDataset(Dataset[dict[str, Any]]):
    """Inputs of the network (``images``) with class ids (``masks``), by epoch and index.

    Args:
        images: readable images with masks.
        view: size, normalisation and interpolation of the network's input.
        reading: what images are read as.
        config: crops, flips, and size of the images in evaluation.
        seed: of random crops and flips; None: whole images.
    """

    images: MaskedSet
    view: PlainView
    reading: Reading
    config: SegmentConfig
    seed: int | None = None

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        epoch, index = key
        with one_thread():
            image, mask = self.images.load(index, self.reading), self.images.load_mask(index)
            if self.seed is None:
                image = self.whole_image(image)
            else:
                seed = fold_seed(self.seed, Stream.VIEW, epoch, name_number(self.images.key(index)))
                image, mask = self.random_crop(image, mask, seed)
        return {"images": image, "masks": mask, "index": index}

    def random_crop(self, image: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return a random resized crop, perhaps flipped, of ``(C, H, W)`` and ``(H, W)``, in the input's size.

        The area of a crop is drawn between ``crop_min`` and all of the area that a window shows in evaluation, so that
        objects have about the same scale in training and in evaluation.
        """
        window, resized = self.view.size, self.evaluated_size(ids.shape)
        shown = window[0] * window[1] / (resized[0] * resized[1])
        rows, columns = ids.shape if self.config.mode == "whole" else window
        ratio = (columns / rows * 3 / 4, columns / rows * 4 / 3)
        crop = RandomResizedCrop(1, scale=(self.config.crop_min * shown, shown), ratio=ratio)
        with seeded(seed):
            box = crop.make_params([image])
            flipped = bool(torch.rand(()) < self.config.flip)
        # torchvision's choice for masks, "nearest", is shifted by up to half a pixel.
        ids = F.resized_crop(ids[None], **box, size=list(window), interpolation=InterpolationMode.NEAREST_EXACT)[0]
        image = self._input(F.crop(image, **box), window)
        return (F.horizontal_flip(image), F.horizontal_flip(ids)) if flipped else (image, ids)

    def whole_image(self, image: Tensor) -> Tensor:
        """Return an image resized for evaluation."""
        return self._input(image, self.evaluated_size(image.shape[1:]))

    def evaluated_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Return rows and columns to which an image of ``size`` is resized in evaluation, neither below a window's."""
        rows, columns = self.view.size
        if self.config.mode == "whole":
            return rows, columns
        short_side = self.config.short_side or min(rows, columns)
        scale = max(short_side / min(size), rows / size[0], columns / size[1])
        return max(rows, round(scale * size[0])), max(columns, round(scale * size[1]))

    def _input(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        image, mode = F.to_dtype(image, torch.float32, scale=True), InterpolationMode(self.view.interpolation)
        resized = F.resize(image, list(size), mode).clamp(0, 1)
        return F.normalize(resized, list(self.view.mean), list(self.view.std))  # type: ignore[no-any-return]
