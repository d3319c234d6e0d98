"""Passes over images whose ids a token store holds: comparing their content, and encoding all their views."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mapet.data.batches import DamageTally
from mapet.data.seeds import Draws
from mapet.data.sources import ImageSet
from mapet.data.views import TrainView
from mapet.data.workers import loading_processes, one_thread
from mapet.engine.runfolder import explain_disk_errors
from mapet.report.progress import Meter
from mapet.tokenizers.base import Tokenizer
from mapet.tokenstore.header import Header
from mapet.tokenstore.store import Rows, State, TokenStore

CHECKED_IMAGES = 256


class AllViews(Dataset[tuple[int, Tensor, Tensor, str]]):
    """All views of each image that a token store with this header holds the ids of.

    An item is the image's index, the digest of its content ``(32,)`` uint8, its views ``(K, C, H, W)`` in [0, 1], and
    the reason if the image cannot be decoded (its views are then blank), else an empty string.
    """

    def __init__(self, images: ImageSet, header: Header, view_size: int) -> None:
        settings = header.view
        self.images, self.channels, self.count = images, settings["channels"], header.views
        self.view = TrainView(0, view_size, settings["crop_min"], settings["flip"], 0.0, (), ())
        self.draws = Draws(header.seed, header.seed, settings["views"], settings["mirror"])

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, str]:
        reason = ""
        try:
            image, digest = self.images.load_with_digest(index, self.channels)
        except Exception as error:  # Pillow's plug-ins raise errors of many types for damaged files
            image, digest = torch.zeros(self.channels, 1, 1, dtype=torch.uint8), _digest(self.images, index)
            reason = f"{type(error).__name__}: {error}"
        drawn = [self.draws.draw(number, self.images.keys[index]) for number in range(self.count)]
        with one_thread():
            views = torch.stack([self.view(image, draw)[0] for draw in drawn])
        return index, digest, views, reason


@dataclass(frozen=True)
class ContentDigests(Dataset[tuple[int, Tensor]]):
    """The index of each image and the digest of its content, ``(32,)`` uint8, without decoding it."""

    images: ImageSet

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, _digest(self.images, index)


def _digest(images: ImageSet, index: int) -> Tensor:
    """Return the digest of an image's content; zeros if its file cannot be read."""
    try:
        return images.digest(index)
    except OSError:
        return torch.zeros(32, dtype=torch.uint8)


@dataclass(frozen=True)
class StoredImages:
    """Images with their token store; the methods take images by index, ``(n,)``.

    Args:
        images: the data set.
        store: the token store.
        rows: row of each image in the store, ``(len(images),)``; -1 for an image without a row.
        workers: number of processes that load images.
        console: where progress is shown.
    """

    images: ImageSet
    store: TokenStore
    rows: Rows
    workers: int
    console: Console

    def pending(self, indices: Rows) -> Rows:
        """Return which images need ids: new, changed and damaged ones, and those with corrupt rows."""
        # Damaged images are tried again in each run, because the decoder may have been the reason.
        written = self.store.states(self.rows[indices]) == State.WRITTEN
        return np.union1d(indices[~written], self.changed(indices[written]))

    def changed(self, indices: Rows) -> Rows:
        """Return which images have another content than when the store was made."""
        changed = np.empty(0, np.int64)
        for index, digests in self._load("reading images", ContentDigests(self.images), indices, 256):
            unchanged = self.store.unchanged(self.rows[index], digests.numpy())
            changed = np.append(changed, index[~unchanged])
        return changed

    def encode(self, indices: Rows, tokenizer: Tokenizer, batch_size: int) -> int:
        """Encode images, ``batch_size`` views at a time, and write their rows; return how many are damaged."""
        tally = DamageTally(self.images, most_share=1.0)
        at_once = max(1, batch_size // self.store.header.views)
        all_views = AllViews(self.images, self.store.header, tokenizer.input_size)
        for index, digests, views, reasons in self._load("encoding", all_views, indices, at_once):
            tally.add([[(i, reason)] if reason else [] for i, reason in zip(index.tolist(), reasons, strict=True)])
            decoded = np.array([not reason for reason in reasons])
            ids = _encode_views(tokenizer, views)
            with explain_disk_errors(self.store.folder):
                self.store.write(self.rows[index], digests.numpy(), ids, decoded)
        return len(tally.indices)

    def agreement(self, indices: Rows, tokenizer: Tokenizer) -> float | None:
        """Encode a sample of images again; return the share of ids that are as stored, None if there is no image."""
        sample = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:CHECKED_IMAGES].numpy()
        all_views = AllViews(self.images, self.store.header, tokenizer.input_size)
        same = []
        for index, _, views, reasons in self._load("encoding again", all_views, indices[sample], 1):
            if not reasons[0]:
                same.append(self.store.ids.rows[self.rows[index]] == _encode_views(tokenizer, views).numpy())
        return float(np.mean(same)) if same else None

    def _load(self, what: str, dataset: Dataset[Any], indices: Rows, batch_size: int) -> Iterator[Any]:
        """Yield batches of items, in the order of ``indices``, and show progress; the first entry is a NumPy array."""
        batches = DataLoader(dataset, batch_size, sampler=indices.tolist(), **loading_processes(self.workers))
        with Meter(self.console, what, len(indices)) as meter:
            for done, (index, *rest) in enumerate(batches, 1):
                yield index.numpy(), *rest  # a tensor of one element would index arrays like an integer
                meter.show(min(done * batch_size, len(indices)))


def _encode_views(tokenizer: Tokenizer, views: Tensor) -> Tensor:
    """Map ``(B, K, C, H, W)`` views to ``(B, K, P)`` ids on the CPU."""
    ids = tokenizer.encode(views.flatten(0, 1).to(tokenizer.device))
    return ids.cpu().view(*views.shape[:2], -1)
