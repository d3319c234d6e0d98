"""Where the ids that a run predicts come from, if it predicts any."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mapet.data.batches import Batch
from mapet.data.sources import ImageSet
from mapet.errors import MapetError
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.targets.tokenizer import check_grid
from mapet.tokenizers.base import Grid, Tokenizer
from mapet.tokenizers.files import load_tokenizer
from mapet.tokenstore.store import TokenStore


class TokenSource(Protocol):
    """Gives what an objective takes beside a batch's images: token ids ``(B, P)`` int64 on the device, or nothing.

    Attributes:
        vocab_size: ``V``; None where there are no ids.
        content_hash: of all that decides the ids.
        tokenizer_hash: of the tokenizer alone.
        view_size: side of the views that it needs in a batch; 0 for none.
        view_seed: of the crops and flips it gives ids for.
        needs_digests: whether it needs the images' content hashes in a batch.
    """

    @property
    def vocab_size(self) -> int | None: ...  # noqa: D102

    content_hash: str
    tokenizer_hash: str
    view_size: int
    view_seed: int
    needs_digests: bool

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the ids as the only element, or none."""


class NoTokens:
    """For an objective that needs nothing but the images."""

    vocab_size, view_size, needs_digests = None, 0, False
    content_hash = tokenizer_hash = "no tokens"

    def __init__(self, seed: int) -> None:
        self.view_seed = seed

    def __call__(self, batch: Batch) -> tuple[()]:
        """Return nothing."""
        return ()


class OnlineTokens:
    """Ids made at each step from the very view that the student sees."""

    needs_digests = False

    def __init__(self, tokenizer: Tokenizer, device: torch.device, seed: int) -> None:
        self._tokenizer, self._device = tokenizer.to(device), device
        self.vocab_size, self.view_size, self.view_seed = tokenizer.vocab_size, tokenizer.input_size, seed
        self.content_hash = self.tokenizer_hash = tokenizer.content_hash

    def __call__(self, batch: Batch) -> tuple[Tensor]:
        """Tokenize the views."""
        return (self._tokenizer.encode(batch["tokenizer_images"].to(self._device, non_blocking=True)),)


class StoredTokens:
    """Ids read from a token store: no tokenizer is run, and each image is held to the content that was tokenized."""

    view_size, needs_digests = 0, True

    def __init__(self, store: TokenStore, images: ImageSet, device: torch.device) -> None:
        self._store, self._keys, self._device = store, images.keys, device
        self._rows = store.rows(images.keys)
        header = store.header
        self.vocab_size, self.view_seed, self.content_hash = header.vocab_size, header.seed, header.digest.hex()
        self.tokenizer_hash = header.tokenizer_hash

    def __call__(self, batch: Batch) -> tuple[Tensor]:
        """Look the ids up.

        Raises:
            MapetError: naming an image that changed since its tokens were made, or has none.
        """
        index = batch["index"].numpy()
        keys = [self._keys[i] for i in index.tolist()]
        ids = self._store.read(self._rows[index], batch["number"].numpy(), batch["digest"].numpy(), keys)
        return (ids.to(self._device, non_blocking=True),)


def open_tokens(
    config: PretrainConfig, images: ImageSet, grid: Grid, device: torch.device
) -> tuple[StoredTokens, PretrainConfig]:
    """Open the token store of a run; return the configuration with the store's views.

    Raises:
        MapetError: if there is none, or it does not fit the images, the student, the tokenizer or the views asked for.
    """
    assert config.tokens is not None
    store = TokenStore.open(config.tokens)
    header = store.header
    check_grid(f"token store {config.tokens!r}", header.grid, grid)
    if (
        config.tokenizer is not None
        and load_tokenizer(config.tokenizer, config.teacher_weights).content_hash != header.tokenizer_hash
    ):
        raise MapetError(
            f"token store {config.tokens!r} was made with another tokenizer than {config.tokenizer!r} "
            f"(it was {header.tokenizer!r}); leave --tokenizer out, or encode again"
        )
    update: dict[str, Any] = {}
    for key, stored in {"vocab_size": header.vocab_size, **header.view}.items():
        asked = getattr(config, key)
        if asked not in (None, stored):
            raise MapetError(
                f"token store {config.tokens!r} was made with {key} {stored!r}, but the run asks for {asked!r}; pass "
                f"--{key.replace('_', '-')} {str(stored).lower()} or encode again"
            )
        update[key] = stored
    return StoredTokens(store, images, device), config.model_copy(update=update)
