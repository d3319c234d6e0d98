"""Batches as pure functions of the step, so that a run can start at any step and see the same images."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.data.views import View
from mapet.data.workers import loading_processes, one_thread
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

SampleKey = tuple[int, int]  # (epoch, index)
Met = tuple[int, str]  # a damaged file: (index, reason)
NO_SEED = Draws(0, 0)  # for views in which nothing is random

# Files that fail are replaced by another image, drawn anew this often before the sample is given up.
MOST_ATTEMPTS = 50


class Sample(TypedDict):
    """One image: its two inputs, which image and which view of it, and the damaged files met on the way."""

    tokenizer_images: Tensor
    images: Tensor
    index: int
    number: int
    digest: Tensor
    damaged: list[Met]


class Batch(TypedDict):
    """``tokenizer_images`` and ``images`` ``(B, C, H, W)``; ``index`` and ``number`` (of the view) ``(B,)``; ``digest``
    ``(B, 32)`` uint8, or ``(B, 0)`` if not asked for; per image the damaged files met, as (index, reason).
    """

    tokenizer_images: Tensor
    images: Tensor
    index: Tensor
    number: Tensor
    digest: Tensor
    damaged: list[list[Met]]


@dataclass(frozen=True)
class StepSampler:
    """Which images each micro-batch of each step holds; iterates from ``first_step`` to ``last_step``.

    Every epoch is a permutation drawn from ``(seed, epoch)``, cut into steps of ``batch_size`` images over
    all processes; what is left over is dropped. A step is cut into ``world * accumulate`` micro-batches.
    """

    images: int
    batch_size: int
    seed: int
    first_step: int
    last_step: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the data."""
        return self.images // self.batch_size

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, permutation = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.first_step, self.last_step):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                generator = torch.Generator().manual_seed(fold_seed(self.seed, Stream.EPOCH, epoch))
                permutation = torch.randperm(self.images, generator=generator)
            start = step % self.steps_per_epoch * self.batch_size
            step_images = permutation[start : start + self.batch_size]
            mine = step_images.chunk(self.world)[self.rank]
            for micro in mine.chunk(self.accumulate):
                yield [(epoch, index) for index in micro.tolist()]


@dataclass(frozen=True)
class ViewDataset(Dataset[Sample]):
    """Decodes and augments; an image that cannot be decoded is replaced by a random other one.

    Args:
        images: the data set.
        view: makes the two inputs.
        channels: 1 or 3.
        draws: which view of an image an epoch shows.
        digests: also give the SHA-256 of each image's content.
    """

    images: ImageSet
    view: View
    channels: int
    draws: Draws = NO_SEED
    digests: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index = key
        replacements = random.Random(fold_seed(self.draws.seed, Stream.VIEW, epoch, index))
        damaged: list[Met] = []
        # A blank image stands in when all attempts fail; DamageTally then stops the run before it is used.
        image = torch.zeros(self.channels, 1, 1, dtype=torch.uint8)
        digest = torch.zeros(32 if self.digests else 0, dtype=torch.uint8)
        while len(damaged) < MOST_ATTEMPTS:
            try:
                image = self.images.load(index, self.channels)
                digest = self.images.digest(index) if self.digests else digest
                break
            except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
                damaged.append((index, f"{type(error).__name__}: {error}"))
                index = replacements.randrange(len(self.images))
        name = self.images.keys[index]
        number = self.draws.number(epoch, name)
        with one_thread():
            view, student = self.view(image, self.draws.draw(number, name, epoch))
        return {
            "tokenizer_images": view,
            "images": student,
            "index": index,
            "number": number,
            "digest": digest,
            "damaged": damaged,
        }


class DamageTally:
    """Counts damaged files, names each in the log once, and stops the run when there are too many.

    Args:
        images: the data set.
        most_share: the run stops when more than this share of the data set has been found damaged.
        known: indices found damaged before, from a checkpoint.
    """

    def __init__(self, images: ImageSet, most_share: float, known: Sequence[int] = ()) -> None:
        self.images, self.most_share = images, most_share
        self.indices = set(known)

    def add(self, damaged: Sequence[Sequence[Met]]) -> None:
        """Take note of the damaged files met for each image of a batch.

        Raises:
            MapetError: if too many files are damaged.
        """
        for met in damaged:
            for index, reason in met:
                if index not in self.indices:
                    self.indices.add(index)
                    logger.warning(
                        "skipped damaged image %s (%s)", printable(self.images.keys[index]), printable(reason)
                    )
            if len(met) == MOST_ATTEMPTS:
                raise self._too_many(f"{MOST_ATTEMPTS} files drawn in a row cannot be read")
        if len(self.indices) > self.most_share * len(self.images):
            raise self._too_many(f"{len(self.indices)} of {len(self.images)} images cannot be read")

    def _too_many(self, what: str) -> MapetError:
        example = self.images.keys[min(self.indices)]
        raising = f" or raise --max-damaged (now {self.most_share:g})" if self.most_share < 1 else ""
        return MapetError(
            f"{what}, the first being {example!r} in {self.images.name}; repair the files named in the log{raising}"
        )


def printable(text: str) -> str:
    """Escape what would break a line of the log or drive a terminal; file names may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a batch."""
    return {
        "tokenizer_images": torch.stack([sample["tokenizer_images"] for sample in samples]),
        "images": torch.stack([sample["images"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "number": torch.tensor([sample["number"] for sample in samples]),
        "digest": torch.stack([sample["digest"] for sample in samples]),
        "damaged": [sample["damaged"] for sample in samples],
    }


def load_batches(
    dataset: ViewDataset, keys: StepSampler | Sequence[list[SampleKey]], workers: int, pin: bool = False
) -> DataLoader[Sample]:
    """Return a loader over the given batches of sample keys, in their order whatever ``workers`` is."""
    return DataLoader(dataset, batch_sampler=keys, collate_fn=collate, pin_memory=pin, **loading_processes(workers))


def in_order(count: int, batch_size: int) -> list[list[SampleKey]]:
    """Batch keys for one plain pass over the first ``count`` images."""
    return [[(0, i) for i in range(start, min(start + batch_size, count))] for start in range(0, count, batch_size)]


def at_random(images: int, count: int, batch_size: int, epoch: int, seed: int) -> list[list[SampleKey]]:
    """Batch keys for at most ``count`` random images out of so many, each once, in the views of an epoch."""
    chosen = torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [[(epoch, index) for index in chosen[i : i + batch_size]] for i in range(0, len(chosen), batch_size)]
