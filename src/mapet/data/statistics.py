"""Numbers that a run measures on a sample of its images before it begins."""

import logging
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet.data.batches import DamageTally, ViewDataset, draw_batches, load_batches
from mapet.data.reading import UNSCALED, Range, Reading
from mapet.data.seeds import Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.data.views import PlainView
from mapet.data.workers import loading_processes
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

SAMPLED_IMAGES = 1000
RANGE, NORMALISATION = 1, 2  # streams of seeds
STATISTICS_EPOCH = -3  # no training epoch


class _Extremes(Dataset[tuple[float, float]]):
    """The least and the greatest stored value of each image; NaN for damaged images and those of 8 bits."""

    def __init__(self, images: ImageSet, reading: Reading) -> None:
        self._images, self._reading = images, reading

    def __getitem__(self, index: int) -> tuple[float, float]:
        try:
            image = self._images.load(index, self._reading)
        except Exception:  # Pillow's plug-ins raise any exception for damaged files; training will name them
            return float("nan"), float("nan")
        if not image.is_floating_point():
            return float("nan"), float("nan")
        low, high = image.aminmax()
        return low.item(), high.item()


def measure_range(images: ImageSet, reading: Reading, seed: int, workers: int) -> Range:
    """Return the least and the greatest stored value of a sample of images with more than 8 bits.

    Raises:
        MapetError: if there is no such image in the sample, or a single value.
    """
    generator = torch.Generator().manual_seed(fold_seed(seed, Stream.STATISTICS, RANGE))
    chosen = torch.randperm(len(images), generator=generator)[:SAMPLED_IMAGES].tolist()
    stored = _Extremes(images, replace(reading, value_range=UNSCALED))
    found = torch.tensor(list(DataLoader(stored, None, sampler=chosen, **loading_processes(workers))))
    found = found[found.isfinite().all(dim=1)]
    if not len(found) or found.min() == found.max():
        what = "has a second value" if len(found) else f"has {reading.channels} channel(s) of more than 8 bits"
        raise MapetError(
            f"the value range of {images.name} cannot be measured: none of {len(chosen)} sampled images {what}; leave "
            "--value-range out, or pass two numbers"
        )
    low, high = found.min().item(), found.max().item()
    logger.info("value range of %d images: %g to %g", len(found), low, high)
    return low, high


def measure_normalisation(
    images: ImageSet, reading: Reading, size: int, max_damaged: float, seed: int, workers: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, over a sample of images resized to ``size`` pixels.

    Raises:
        MapetError: if too many images are damaged.
    """
    view = PlainView((size, size), (0.0,) * reading.channels, (1.0,) * reading.channels)
    seed = fold_seed(seed, Stream.STATISTICS, NORMALISATION)
    keys = draw_batches(len(images), SAMPLED_IMAGES, 32, STATISTICS_EPOCH, seed)
    tally, pixels = DamageTally(images, max_damaged), 0
    sums = torch.zeros(2, reading.channels, dtype=torch.float64)
    for batch in load_batches(ViewDataset(images, view, reading), keys, workers):
        tally.add(batch["damaged"])
        # Another image stands in for a damaged one; only undamaged images count.
        values = batch["tokenizer_images"][[not met for met in batch["damaged"]]].double()
        sums += torch.stack([_sum(values), _sum(values.square())])
        pixels += values[:, 0].numel()
    mean, square = sums / pixels
    std = (square - mean.square()).clamp(min=0).sqrt()
    flat = (std < 1e-6).nonzero()[:, 0].tolist()
    if flat:
        logger.warning(
            "channel %d of %s has the same value everywhere; its deviation is taken as 1", flat[0], images.name
        )
    std[flat] = 1.0
    mean_values, std_values = (tuple(round(value, 6) for value in part.tolist()) for part in (mean, std))
    logger.info("mean %s and deviation %s of the images", mean_values, std_values)
    return mean_values, std_values


def _sum(values: Tensor) -> Tensor:
    return values.sum(dim=(0, 2, 3))
