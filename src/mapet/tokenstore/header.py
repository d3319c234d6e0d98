"""What the ids of a token store were made with: its ``header.json``."""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from mapet.errors import MapetError

FORMAT = 2
NOT_COMPARED = {"format", "tokenizer"}  # tokenizer_hash identifies the tokenizer wherever it lies


class Header(BaseModel):
    """Everything that decides the ids of a store, and their shape and type.

    Args:
        tokenizer: path or name of the tokenizer, for information only.
        tokenizer_hash: ``content_hash`` of the tokenizer.
        grid: rows and columns of patches; ``P`` is their product.
        vocab_size: ``V``; ids are in ``[0, V)``.
        view: settings of the tokenized views; a store compares these settings but does not interpret them.
        views: ``K``, the number of stored views per image.
        seed: seed of the views.
        format: number of the store's file format.
    """

    model_config = ConfigDict(frozen=True)

    tokenizer: str
    tokenizer_hash: str
    grid: tuple[int, int]
    vocab_size: int
    view: dict[str, Any]
    views: int
    seed: int
    format: int = FORMAT

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(K, P)`` of the ids of one image."""
        return self.views, self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integer type that holds every id, little-endian."""
        return np.min_scalar_type(self.vocab_size - 1).newbyteorder("<")

    @property
    def digest(self) -> bytes:
        """SHA-256 of all entries."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).digest()

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a ``header.json``.

        Raises:
            MapetError: if the file is missing or damaged, or the store has another format.
        """
        try:
            header = cls.model_validate_json(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise MapetError(f"{file.parent} is not a token store; make one with: mapet tokenizer encode") from None
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise MapetError(f"{file} is damaged ({reason}); restore it or encode into another folder") from error
        if header.format != FORMAT:
            raise MapetError(f"{file} has format {header.format}, not {FORMAT}; remove the store and encode again")
        return header

    def compared_entries(self) -> dict[str, Any]:
        """Return the entries that change the ids, by name."""
        entries = self.model_dump(exclude=NOT_COMPARED)
        # The settings of the views come first because the number of stored views follows from them.
        return {f"view {name}": value for name, value in entries.pop("view").items()} | entries
