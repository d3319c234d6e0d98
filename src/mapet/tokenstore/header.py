"""What the ids of a token store were made with: its ``header.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from mapet.errors import MapetError

FORMAT = 1
FOR_THE_RECORD = ("tokenizer", "kind")  # the tokenizer's hash says more than its name


@dataclass(frozen=True)
class Header:
    """What decides the ids of a store, and what they look like.

    Args:
        tokenizer, kind: where the tokenizer lay and what it is, for the record.
        tokenizer_hash: its ``content_hash``.
        grid: rows and columns of patches; ``P`` is their product.
        vocab_size: ``V``; ids are in ``[0, V)``.
        view: settings of the views that were tokenized, JSON-able; a store compares them and does not read them.
        views: ``K``, how many views of each image are stored.
        seed: of the views.

    Raises:
        MapetError: if a number is out of range.
    """

    tokenizer: str
    kind: str
    tokenizer_hash: str
    grid: tuple[int, int]
    vocab_size: int
    view: Mapping[str, Any]
    views: int
    seed: int

    def __post_init__(self) -> None:
        # As JSON gives them back: equal headers stay equal when one of them comes from a file.
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "view", json.loads(json.dumps(self.view)))
        if min(*self.grid, self.vocab_size, self.views) < 1 or self.vocab_size > 1 << 32 or self.views > 1 << 16:
            raise MapetError(
                f"a token store cannot hold {self.views} views an image of {self.grid} patches with {self.vocab_size} "
                "ids; each must be at least 1, views at most 2**16 and ids at most 2**32"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, P)``: what is stored for an image."""
        return self.views, self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integer type that holds every id, little-endian."""
        return np.min_scalar_type(self.vocab_size - 1).newbyteorder("<")

    @property
    def digest(self) -> bytes:
        """SHA-256 of all entries; the index repeats it, so that neither can be exchanged alone."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def write(self, file: Path) -> None:
        """Write it as JSON, with the number of the store's format."""
        file.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what ``write`` wrote.

        Raises:
            MapetError: if there is no header, it is no JSON, of another format, or lacks an entry.
        """
        try:
            content = json.loads(file.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise MapetError(
                f"{file.parent} holds no token store ({file.name} is missing); make one with: mapet tokenizer encode"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise MapetError(f"{file} cannot be read ({error}); put the original back or encode again") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise MapetError(
                f"{file} is not of format {FORMAT}, the one that this version of mapet reads; use the version that "
                "made it, or encode again"
            )
        try:
            return cls(**content)
        except (TypeError, ValueError, MapetError) as error:
            raise changed(file) from error

    def first_difference(self, other: Header) -> tuple[str, Any, Any] | None:
        """Name the first entry that makes other ids, with both values; None if the ids are the same."""
        ours, theirs = self._entries(), other._entries()
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                return name, ours.get(name), theirs.get(name)
        return None

    def _entries(self) -> dict[str, Any]:
        entries = {name: value for name, value in asdict(self).items() if name not in FOR_THE_RECORD}
        # The views' settings first: they say more than the number that follows from them.
        return {f"view {name}": value for name, value in entries.pop("view").items()} | entries


def changed(file: Path) -> MapetError:
    """Return the error for a header that is not the one that the store was made with."""
    return MapetError(
        f"{file} was changed after the store was made, or is another store's; put the original back or encode again"
    )
