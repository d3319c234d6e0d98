"""Batches as pure functions of the step: a run that starts at any step sees the same images from there on."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mapet.data.reading import Reading
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.data.stores import StoreError
from mapet.data.views import Cut, View, unit
from mapet.data.workers import loading_processes, one_thread, patiently
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

SampleKey = tuple[int, int]  # (epoch, index)
DamagedImage = tuple[int, str]  # (index, reason)
NO_SEED = Draws(0, 0)  # for views without randomness

# A damaged image is replaced by another one, drawn at random, at most this often for each sample.
MOST_ATTEMPTS = 50


class Sample(TypedDict):
    """What a loading process makes of one image; see ``Batch`` for the entries."""

    cut: Cut
    index: int
    number: int
    digest: Tensor
    damaged: list[DamagedImage]


class Batch(TypedDict):
    """Views of ``B`` images.

    - ``tokenizer_images`` and ``images``: ``(B, C, H, W)`` on the training device, the two outputs of the view.
    - ``index``: ``(B,)``, the index of each image in its set.
    - ``number``: ``(B,)``, the number of the view; see ``seeds.Draws``.
    - ``digest``: ``(B, 32)`` uint8, the SHA-256 of each image's stored bytes; ``(B, 0)`` if it is not asked for.
    - ``damaged``: for each image, the damaged images that it replaces.
    """

    tokenizer_images: Tensor
    images: Tensor
    index: Tensor
    number: Tensor
    digest: Tensor
    damaged: list[list[DamagedImage]]


@dataclass(frozen=True)
class BatchPart:
    """The rows of a step's batch that a process computes at once.

    What is random for each image is drawn for the whole batch, and each process takes its own rows. So it does not
    depend on how the batch is divided among processes and micro-batches.

    Attributes:
        rows: the rows.
        total: rows of the batch.
        generator: source of randomness on the CPU, the same for all parts of a step.
    """

    rows: slice
    total: int
    generator: torch.Generator


@dataclass(frozen=True)
class StepSampler:
    """The sample keys of each micro-batch, from ``first_step`` to before ``last_step``.

    Every epoch is a permutation of the images drawn from ``(seed, epoch)`` and cut into steps of ``batch_size``
    images over all processes; the remainder is dropped. A step is cut into ``world * accumulate`` micro-batches.
    """

    images: int
    batch_size: int
    seed: int
    first_step: int
    last_step: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def part(self, step: int, micro_batch: int) -> BatchPart:
        """Return what this process computes in a micro-batch of a step."""
        size = self.batch_size // (self.world * self.accumulate)
        start = (self.rank * self.accumulate + micro_batch) * size
        generator = torch.Generator().manual_seed(fold_seed(self.seed, Stream.STEP, step, 0))
        return BatchPart(slice(start, start + size), self.batch_size, generator)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, permutation = -1, torch.empty(0, dtype=torch.long)
        steps_per_epoch = self.images // self.batch_size
        for step in range(self.first_step, self.last_step):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                generator = torch.Generator().manual_seed(fold_seed(self.seed, Stream.EPOCH, epoch))
                permutation = torch.randperm(self.images, generator=generator)
            start = step % steps_per_epoch * self.batch_size
            step_images = permutation[start : start + self.batch_size]
            rank_images = step_images.chunk(self.world)[self.rank]
            for micro_batch in rank_images.chunk(self.accumulate):
                yield [(epoch, index) for index in micro_batch.tolist()]


@dataclass(frozen=True)
class ViewDataset(Dataset[Sample]):
    """Views of images; an image that cannot be decoded is replaced by another one, drawn at random.

    Args:
        images: the image set.
        view: makes the two outputs from a decoded image.
        reading: what images are read as.
        draws: which view of an image an epoch shows.
        digests: also return the SHA-256 of each image's stored bytes.
    """

    images: ImageSet
    view: View
    reading: Reading
    draws: Draws = NO_SEED
    digests: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index = key
        replacements = random.Random(fold_seed(self.draws.seed, Stream.VIEW, epoch, index))
        damaged: list[DamagedImage] = []
        # A blank image is returned if all attempts fail; DamageTally stops the run before it is used.
        image = torch.zeros(self.reading.channels, 1, 1, dtype=torch.uint8)
        digest = torch.zeros(32 if self.digests else 0, dtype=torch.uint8)
        while len(damaged) < MOST_ATTEMPTS:
            try:
                if self.digests:
                    image, digest = self.images.load_with_digest(index, self.reading)
                else:
                    image = self.images.load(index, self.reading)
                break
            except StoreError:  # another image instead would depend on the network
                raise
            except Exception as error:  # Pillow's plug-ins raise any exception for damaged files
                damaged.append((index, f"{type(error).__name__}: {error}"))
                index = replacements.randrange(len(self.images))
        name = self.images.key(index)
        number = self.draws.number(epoch, name)
        with one_thread():
            cut = self.view.cut(image, self.draws.draw(number, name, epoch))
        return {"cut": cut, "index": index, "number": number, "digest": digest, "damaged": damaged}


@dataclass
class DamageTally:
    """Counts the damaged images of a run, logs each of them once, and stops the run when there are too many.

    Attributes:
        images: the image set.
        most_share: the largest share of damaged images with which the run goes on.
        indices: of the images found damaged.
    """

    images: ImageSet
    most_share: float
    indices: set[int] = field(default_factory=set)

    def add(self, damaged: Sequence[Sequence[DamagedImage]]) -> None:
        """Count the damaged images of a batch, given for each image of the batch.

        Raises:
            MapetError: if too many images are damaged.
        """
        met = [(index, printable(reason)) for index, reason in chain.from_iterable(damaged)]
        for index, reason in met:
            if index not in self.indices:
                self.indices.add(index)
                logger.warning("skipped damaged image %s (%s)", printable(self.images.key(index)), reason)
        in_vain = any(len(attempts) == MOST_ATTEMPTS for attempts in damaged)
        if in_vain or len(self.indices) > self.most_share * len(self.images):
            count, advice = f"{MOST_ATTEMPTS} files drawn in a row", ""
            if not in_vain:
                count = f"{len(self.indices)} of {len(self.images)} images"
                advice = f" or raise --max-damaged (now {self.most_share:g})"
            first = min(self.indices)
            reason = dict(met).get(first, "see the log")
            raise MapetError(
                f"{count} cannot be read, the first being {self.images.key(first)!r} in {self.images.name} ({reason}); "
                f"repair the files named in the log{advice}"
            )


def printable(text: str) -> str:
    """Escape characters that would break a line of the log or control a terminal: file names may contain any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Stack samples into a batch: a ``cut`` instead of the images, and the other entries of ``Batch``."""
    # Images of 8 bits and of more may be in one batch; lists of different lengths cannot be stacked.
    cuts = [
        [unit(part) for part in parts] if len({part.dtype for part in parts}) > 1 else list(parts)
        for parts in zip(*(sample["cut"] for sample in samples), strict=True)
    ]
    others = default_collate([{**sample, "cut": 0, "damaged": 0} for sample in samples])
    damaged = [sample["damaged"] for sample in samples]
    return {**others, "cut": Cut(*map(default_collate, cuts)), "damaged": damaged}


def load_batches(
    dataset: ViewDataset,
    keys: StepSampler | Sequence[list[SampleKey]],
    workers: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Batch]:
    """Return the batches with the given sample keys, on the device; their order does not depend on ``workers``.

    ``waiting`` is called now and then while a batch is waited for, and for what it raises see ``patiently``.
    """
    pin = device.type == "cuda"
    # Begun here and not by the first step, because a loader draws from the random state that the step has seeded.
    processes = loading_processes(workers, dataset.images.source.start_method)
    loaded = iter(DataLoader(dataset, batch_sampler=keys, collate_fn=collate, pin_memory=pin, **processes))

    def finish(batch: dict[str, Any]) -> Batch:
        cut = Cut(*(part.to(device, non_blocking=True) for part in batch.pop("cut")))
        tokenizer_images, images = dataset.view.finish(cut)
        return {**batch, "tokenizer_images": tokenizer_images, "images": images}  # type: ignore[typeddict-item]

    return map(finish, patiently(loaded, dataset.images.name, waiting))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on the device, which is not waited for."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def in_order(count: int, batch_size: int) -> list[list[SampleKey]]:
    """Return the sample keys of one pass in order over the first ``count`` images, in the views of epoch 0."""
    return _cut(range(count), batch_size, epoch=0)


def draw_batches(images: int, count: int, batch_size: int, epoch: int, seed: int) -> list[list[SampleKey]]:
    """Draw ``count`` of ``images`` indices (or all) without replacement; return sample keys with these and an epoch."""
    chosen = torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return _cut(chosen, batch_size, epoch)


def _cut(indices: Sequence[int], batch_size: int, epoch: int) -> list[list[SampleKey]]:
    keys = [(epoch, index) for index in indices]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
