"""Sources of the values that a run predicts: a tokenizer, a token store, a frozen teacher, or the images alone.

A source is called with a batch and returns the arguments of the objective besides the images.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mapet.data.batches import Batch, sent
from mapet.data.sources import ImageSet
from mapet.errors import MapetError
from mapet.tokenizers.base import Grid, Tokenizer, hash_content
from mapet.tokenizers.files import load_tokenizer
from mapet.tokenizers.teachers import Teacher
from mapet.tokenstore.store import TokenStore


class TargetSource(Protocol):
    """A source of target values.

    Attributes:
        width: number of ids, or width of the features; 0 for pixels.
        content_hash: SHA-256 of everything that decides the values; a resumed run must have the same.
        view_size: side of the ``tokenizer_images`` that a batch must have; 0 for none.
        view_seed: seed of the crops and flips that the values are made for.
        needs_digests: whether a batch must have the digests of the images.
    """

    width: int
    content_hash: str
    view_size: int
    view_seed: int
    needs_digests: bool

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the values ``(B, P, ...)`` of a batch on the device; an empty tuple for pixels."""


class NoSource:
    """Source of targets that are computed from the images alone, such as pixels."""

    width, view_size, needs_digests = 0, 0, False
    content_hash = "pixels"

    def __init__(self, seed: int) -> None:
        self.view_seed = seed

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return an empty tuple."""
        return ()


class OnlineIds:
    """Ids of a tokenizer, computed at each step from the view that the student sees."""

    needs_digests = False

    def __init__(self, tokenizer: Tokenizer, device: torch.device, seed: int) -> None:
        self.tokenizer, self._device = tokenizer.to(device), device
        self.width, self.view_size, self.view_seed = tokenizer.vocab_size, tokenizer.input_size, seed
        self.content_hash = tokenizer.content_hash

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the ids of a batch of views, ``(B, P)`` int64."""
        return (self.tokenizer.encode(batch["tokenizer_images"].to(self._device)),)


class StoredIds:
    """Ids read from a token store, which are compared with the digest of each image."""

    view_size, needs_digests = 0, True

    def __init__(self, store: TokenStore, images: ImageSet, device: torch.device) -> None:
        self._store, self._keys, self._device = store, images.keys, device
        self._rows = store.rows(images.keys)
        header = store.header
        self.width, self.view_seed, self.content_hash = header.vocab_size, header.seed, header.digest.hex()

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the stored ids of a batch, ``(B, P)`` int64.

        Raises:
            MapetError: naming an image that changed after encoding, or has no ids.
        """
        index = batch["index"].numpy()
        keys = [self._keys[i] for i in index.tolist()]
        ids = self._store.read(self._rows[index], batch["number"].numpy(), batch["digest"].numpy(), keys)
        return (sent(ids, self._device),)


def settle_view(store: TokenStore, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the views whose ids a token store holds.

    Args:
        store: the token store.
        given: configuration by key, as the user gave it.

    Raises:
        MapetError: if the user asks for other views, another vocabulary or another tokenizer.
    """
    header, settings = store.header, store.view_settings.model_dump()
    for name, stored in {"vocab_size": header.vocab_size, **settings}.items():
        asked = given.get(name)
        if asked not in (None, stored):
            values = stored if isinstance(stored, tuple) else (stored,)
            raise MapetError(
                f"token store {str(store.folder)!r} was made with {name} {stored!r}, but the run asks for {asked!r}; "
                f"pass --{name.replace('_', '-')} {' '.join(map(str, values)).lower()} or encode again"
            )
    tokenizer = given.get("tokenizer")
    if tokenizer is not None:
        content_hash = load_tokenizer(tokenizer, given.get("teacher_weights")).content_hash
        if content_hash != header.tokenizer_hash:
            raise MapetError(
                f"token store {str(store.folder)!r} was made with another tokenizer than {tokenizer!r} (it was "
                f"{header.tokenizer!r}); leave --tokenizer out, or encode again"
            )
    return settings


class TeacherFeatures:
    """Features of a frozen teacher, computed at each step from the view that the student sees.

    Args:
        teacher: the teacher, on its device.
        size: side of the teacher's input in pixels.
        grid: rows and columns of patches; the teacher's map is resized to it.
        seed: seed of the views.
    """

    needs_digests = False

    def __init__(self, teacher: Teacher, size: int, grid: Grid, seed: int) -> None:
        self._teacher, self._grid = teacher, grid
        self.width, self.view_size, self.view_seed = teacher.width(size), size, seed
        self.content_hash = hash_content([teacher.config, size], teacher)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the features of a batch of views, ``(B, P, d)``."""
        views = batch["tokenizer_images"].to(self._teacher.mean.device)
        return (self._teacher.on_grid(views, self.view_size, self._grid),)
