"""Token stores: folders of arrays with the ids of images.

header.json    what the ids were made with, see ``Header``
ids.npy        (rows, K, P) ids, in the smallest unsigned integer type
images.npy     (rows,) records of ``IMAGE``: which image a row belongs to, and its state
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor, from_numpy

from mapet.config.keys import ordered_range
from mapet.data.seeds import name_number
from mapet.errors import MapetError
from mapet.tokenstore.arrays import GrowingArray

FORMAT = 2
HEADER_FILE, IDS_FILE, IMAGES_FILE = "header.json", "ids.npy", "images.npy"

# 64 bits of a key's hash suffice: if two images had the same ones, their content digests would still differ.
IMAGE = np.dtype([("key", "<u8"), ("content", "u1", 32), ("state", "u1"), ("checksum", "<u4")])

Rows = NDArray[np.int64]


class ViewSettings(BaseModel):
    """The views that a store holds the ids of, as ``mapet tokenizer encode`` writes them into ``Header.view``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_min: float = Field(gt=0, le=1)
    flip: float = Field(ge=0, le=1)
    mirror: bool
    views: int = Field(ge=1, le=10_000)
    channels: int = Field(ge=1, le=1024)
    value_range: Annotated[tuple[float, float], AfterValidator(ordered_range)] | None = None


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
    grid: tuple[PositiveInt, PositiveInt]
    vocab_size: int = Field(ge=1, le=2**32)
    view: dict[str, Any]
    views: PositiveInt
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
        """Return the entries that change the ids, by name; ``tokenizer_hash`` identifies the tokenizer."""
        entries = self.model_dump(exclude={"format", "tokenizer"})
        # The settings of the views come first because the number of stored views follows from them.
        return {f"view {name}": value for name, value in entries.pop("view").items()} | entries


class State(IntEnum):
    """State of a row. ``CORRUPT`` is never stored: it is found by checksum and vocabulary."""

    EMPTY = 0
    WRITTEN = 1
    DAMAGED = 2  # the image could not be decoded
    CORRUPT = 3


class TokenStore:
    """Ids of images, one row per image, found by the image's key and compared with its content.

    One process appends rows with ``append``; then several processes may ``write``, each its own rows. After a kill at
    any moment every row is whole, ``EMPTY`` or ``CORRUPT``.

    Digests are SHA-256 of the images' content, ``(b, 32)`` uint8. The arrays are memory-mapped; looking up keys takes
    about 200 bytes per key while it lasts.

    Args:
        folder: of a store that ``create`` made.

    Attributes:
        header: what the ids were made with.
        ids: array of the ids, ``(rows, K, P)``.

    Raises:
        MapetError: if there is no store, or a file is damaged, cut short or belongs to another store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = Header.read(self.folder / HEADER_FILE)
        self._seed = zlib.crc32(self.header.digest)
        self._images = GrowingArray(self.folder / IMAGES_FILE, IMAGE, ())
        # A kill inside of append() may leave more rows of ids than of images.
        self.ids = GrowingArray(self.folder / IDS_FILE, self.header.dtype, self.header.shape, least_rows=len(self))

    @classmethod
    def create(cls, folder: Path, header: Header) -> Self:
        """Make an empty store in an empty folder; hidden files do not count.

        Raises:
            MapetError: if the folder is not empty.
            OSError: if the files cannot be written.
        """
        # The header gets its name last, so that a folder with a header is a whole store.
        unnamed = folder / f".{HEADER_FILE}.new"
        if not unnamed.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise MapetError(f"output folder {folder} is not empty and holds no token store; choose another --out")
        unnamed.write_text(header.model_dump_json(indent=2) + "\n")
        np.save(folder / IDS_FILE, np.empty((0, *header.shape), header.dtype))
        np.save(folder / IMAGES_FILE, np.empty(0, IMAGE))
        unnamed.rename(folder / HEADER_FILE)
        return cls(folder)

    def __len__(self) -> int:
        return len(self._images.rows)

    @property
    def view_settings(self) -> ViewSettings:
        """The settings of the views.

        Raises:
            MapetError: if the header has other settings than ``mapet tokenizer encode`` writes.
        """
        try:
            settings = ViewSettings.model_validate(self.header.view)
        except ValidationError as error:
            first = error.errors()[0]
            what = f"view {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        else:
            if settings.views * (2 if settings.mirror else 1) == self.header.views:
                return settings
            what = f"{self.header.views} views do not follow from its settings of views and mirror"
        raise MapetError(f"{self.folder / HEADER_FILE} is damaged ({what}); restore it or encode into another folder")

    def check_header(self, wanted: Header) -> None:
        """Refuse a store whose ids are not those that ``wanted`` describes.

        Raises:
            MapetError: naming the first entry that differs.
        """
        stored, asked = self.header.compared_entries(), wanted.compared_entries()
        for name in stored | asked:
            if stored.get(name) != asked.get(name):
                raise MapetError(
                    f"token store {self.folder} was made with {name} {stored.get(name)!r}, but {asked.get(name)!r} is "
                    "asked for; ask for the same, or encode into another folder"
                )

    def append(self, keys: Sequence[str]) -> None:
        """Append an empty row for each key that has no row. Only one process may do this at a time.

        Raises:
            OSError: if the files cannot be written.
        """
        known = dict.fromkeys(self._images.rows["key"].tolist())
        new = [number for number in dict.fromkeys(map(name_number, keys)) if number not in known]
        images = np.zeros(len(new), IMAGE)
        images["key"] = new
        self.ids.grow(len(self) + len(new))
        self._images.grow(len(self) + len(new), images.tobytes())

    def find(self, keys: Sequence[str]) -> Rows:
        """Return the row of each key, ``(n,)``, which may be empty; -1 if the key has no row."""
        row_of = {number: row for row, number in enumerate(self._images.rows["key"].tolist())}
        return np.array([row_of.get(name_number(key), -1) for key in keys], np.int64)

    def rows(self, keys: Sequence[str]) -> Rows:
        """Return the row of each key, ``(n,)``.

        Raises:
            MapetError: if a key has no row or an empty one.
        """
        rows = self.find(keys)
        states = self._images.rows["state"]
        missing = [key for key, row in zip(keys, rows, strict=True) if row < 0 or states[row] == State.EMPTY]
        if missing:
            raise MapetError(
                f"{len(missing)} of {len(keys)} images have no tokens in {self.folder}, the first being "
                f"{missing[0]!r}; append them with: mapet tokenizer encode"
            )
        return rows

    def states(self, rows: Rows) -> NDArray[np.uint8]:
        """Return the ``State`` of each row, ``(b,)``, after verifying its checksum and that its ids are in [0, V)."""
        images, ids = self._images.rows[rows], [self.ids.rows[row] for row in rows.tolist()]
        beyond = np.array([row.max() >= self.header.vocab_size for row in ids], bool)
        corrupt = (images["state"] != State.EMPTY) & ((images["checksum"] != self._checksums(images, ids)) | beyond)
        return np.where(corrupt, np.uint8(State.CORRUPT), images["state"])

    def unchanged(self, rows: Rows, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return for each row, ``(b,)``, whether it was made from the content with this digest."""
        return np.asarray((self._images.rows["content"][rows] == digests).all(1))

    def write(self, rows: Rows, digests: NDArray[np.uint8], ids: Tensor, decoded: NDArray[np.bool_]) -> None:
        """Write the ids of images.

        Args:
            rows: ``(b,)``; no other process may write them at the same time.
            digests: of the images' content.
            ids: ``(b, K, P)`` integers in ``[0, V)`` on the CPU.
            decoded: ``(b,)``, false for images that could not be decoded; their ids are ignored.

        Raises:
            OSError: if the files cannot be written.
        """
        assert ids.shape == (len(rows), *self.header.shape), ids.shape
        assert 0 <= ids.numpy().min() <= ids.numpy().max() < self.header.vocab_size
        values = np.ascontiguousarray(ids.numpy(), self.header.dtype)
        values[~decoded] = 0
        images = self._images.rows[rows]
        images["content"], images["state"] = digests, np.where(decoded, State.WRITTEN, State.DAMAGED)
        images["checksum"] = self._checksums(images, values)
        self.ids.write(rows, values)
        self._images.write(rows, images)

    def read(self, rows: Rows, views: NDArray[np.int64], digests: NDArray[np.uint8], keys: Sequence[str]) -> Tensor:
        """Return the ids of one view of each image, ``(b, P)`` int64.

        Args:
            rows: ``(b,)``.
            views: which of the K views, ``(b,)``.
            digests: of the content that the images have now.
            keys: of the images, for the error message.

        Raises:
            MapetError: naming an image without ids, with corrupt ids, or that changed since its ids were made.
        """
        states = self.states(rows)
        good = self.unchanged(rows, digests) & (states == State.WRITTEN)
        if not good.all():
            bad = int(good.argmin())
            reason = {
                State.EMPTY: "has no tokens yet",
                State.WRITTEN: "changed since its tokens were made",
                State.DAMAGED: "could not be decoded when its tokens were to be made",
                State.CORRUPT: "has tokens that fail their checksum or exceed the vocabulary",
            }[State(states[bad])]
            raise MapetError(f"image {keys[bad]!r} {reason} (token store {self.folder}); run: mapet tokenizer encode")
        return from_numpy(self.ids.rows[rows, views].astype(np.int64))

    def _checksums(self, images: NDArray[Any], ids: Iterable[NDArray[Any]]) -> NDArray[np.uint32]:
        """Return the CRC-32 of each row: of the store's header, the image's record up to its checksum, and the ids."""
        content = images.tobytes()
        starts = range(0, len(content), IMAGE.itemsize)
        records = (content[start : start + IMAGE.itemsize - IMAGE["checksum"].itemsize] for start in starts)
        sums = [zlib.crc32(row.data, zlib.crc32(record, self._seed)) for row, record in zip(ids, records, strict=True)]
        return np.array(sums, np.uint32)
