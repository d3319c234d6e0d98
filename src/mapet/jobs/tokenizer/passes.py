"""Plain passes over images: every view of each, or only the digest of its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet.data.batches import DamagedImage
from mapet.data.seeds import Draws
from mapet.data.sources import ImageSet
from mapet.data.views import TrainView
from mapet.data.workers import loading_processes, one_thread

Part = TypeVar("Part")


class Views(TypedDict):
    """``views`` ``(B, K, C, H, W)`` in [0, 1], blank where an image is damaged; ``index`` ``(B,)``; ``digest``
    ``(B, 32)`` uint8; per image (index, reason) if it is damaged.
    """

    views: Tensor
    index: Tensor
    digest: Tensor
    damaged: list[list[DamagedImage]]


class Digests(TypedDict):
    """``index`` ``(B,)`` and ``digest`` ``(B, 32)`` uint8."""

    index: Tensor
    digest: Tensor


@dataclass(frozen=True)
class EveryView(Dataset[Views]):
    """All views of each image of a fixed number, as a training run with the same ``draws`` shows them."""

    images: ImageSet
    view: TrainView
    channels: int
    draws: Draws

    def __getitem__(self, indices: Sequence[int]) -> Views:
        views, damaged = [], []
        for index in indices:
            met: list[DamagedImage] = []
            try:
                image = self.images.load(index, self.channels)
            except Exception as error:  # Pillow's plug-ins raise whatever they like on damaged files
                image = torch.zeros(self.channels, 1, 1, dtype=torch.uint8)
                met.append((index, f"{type(error).__name__}: {error}"))
            assert self.draws.count is not None
            with one_thread():
                drawn = [self.draws.draw(number, self.images.keys[index]) for number in range(self.draws.count)]
                views.append(torch.stack([self.view(image, draw)[0] for draw in drawn]))
            damaged.append(met)
        return {
            "views": torch.stack(views),
            "index": torch.tensor(indices),
            "digest": torch.stack([_digest(self.images, index) for index in indices]),
            "damaged": damaged,
        }


@dataclass(frozen=True)
class ContentOnly(Dataset[Digests]):
    """The digest of each image's content; nothing is decoded."""

    images: ImageSet

    def __getitem__(self, indices: Sequence[int]) -> Digests:
        return {
            "index": torch.tensor(indices),
            "digest": torch.stack([_digest(self.images, index) for index in indices]),
        }


def _digest(images: ImageSet, index: int) -> Tensor:
    """Return an image's digest; zeros if its file cannot be read at all."""
    try:
        return images.digest(index)
    except OSError:
        return torch.zeros(32, dtype=torch.uint8)


def load_passes(dataset: Dataset[Part], indices: Sequence[int], batch_size: int, workers: int) -> DataLoader[Part]:
    """Return a loader over the images at ``indices``, in that order."""
    parts = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
    # A whole batch is made by one worker: batch_size None hands on what the dataset gives.
    return DataLoader(dataset, batch_size=None, sampler=parts, **loading_processes(workers))
