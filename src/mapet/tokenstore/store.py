"""Token stores: folders of ids that cannot be read for any other image than they were made from.

header.json    what the ids were made with, see ``Header``
index.bin      how many rows there are, then a record per row: which image, in which state, see ``records``
ids.bin        per row the ids of K views of P patches
.lock          held by the process that appends
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from mapet.errors import MapetError
from mapet.tokenstore.header import Header, changed
from mapet.tokenstore.records import MAGIC, PREAMBLE, State, as_digests, checksums, find, key_digests, record_type

logger = logging.getLogger(__name__)

HEADER_FILE, INDEX_FILE, IDS_FILE, LOCK_FILE = "header.json", "index.bin", "ids.bin", ".lock"
CHUNK_BYTES = 4 << 20  # of rows looked at together

Rows = NDArray[np.int64]
Digests = NDArray[np.uint8]


@dataclass(frozen=True)
class Report:
    """What ``verify`` found: how many rows there are of each kind, and which are corrupt."""

    rows: int
    written: int
    damaged: int
    empty: int
    corrupt: Rows


class TokenStore:
    """Ids of images, a row per image, found by the image's key and held to its content.

    One process appends rows with ``plan``; it and others may then ``write`` rows, each its own. A kill at any moment
    leaves rows that are whole or ``pending``.

    Rows are read through memory maps, of which the system keeps in memory what it has to spare; a store holds nothing
    itself. Looking keys up takes 40 bytes a key and 24 a row while it lasts, appending 200 a row; 8 bytes a key remain,
    the rows.

    Digests are SHA-256, ``(b, 32)`` uint8. Of an image's content, they are over whatever the caller decodes.
    """

    def __init__(self, folder: Path, writable: bool) -> None:
        self.folder = folder
        self.header = Header.read(folder / HEADER_FILE)
        self._lock = FileLock(folder / LOCK_FILE)
        self._record_type = record_type(self.header.views)
        self._row_bytes = self.header.shape[0] * self.header.shape[1] * self.header.dtype.itemsize
        self._files: tuple[int, int] | None = None
        with self._explain("opened"):
            self._map()
            if writable:
                self._files = os.open(folder / INDEX_FILE, os.O_RDWR), os.open(folder / IDS_FILE, os.O_RDWR)

    @classmethod
    def create(cls, folder: str | Path, header: Header) -> Self:
        """Make an empty store and open it for writing.

        Raises:
            MapetError: if the folder exists and is not empty, or cannot be made.
        """
        folder = Path(folder).absolute()
        # Renamed when it is whole, so that a kill leaves none by halves.
        fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir(parents=True)
            header.write(fresh / HEADER_FILE)
            (fresh / INDEX_FILE).write_bytes(PREAMBLE.pack(MAGIC, 0, header.digest))
            (fresh / IDS_FILE).touch()
            fresh.rename(folder)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise MapetError(
                f"token store {folder} cannot be made ({error.strerror}); name a folder that is new or empty"
            ) from error
        return cls.open(folder, writable=True)

    @classmethod
    def open(cls, folder: str | Path, writable: bool = False) -> Self:
        """Open a store to read it, or also to write.

        Raises:
            MapetError: if there is none, its files do not belong together, or one is cut short.
        """
        return cls(Path(folder), writable)

    def close(self) -> None:
        """Flush what was written, and let others append."""
        with self._explain("written"):
            for file in self._files or ():
                os.fsync(file)
                os.close(file)
        self._files = None
        self._lock.release(force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._records)

    def check_header(self, wanted: Header) -> None:
        """Refuse a store whose ids are not those that ``wanted`` describes.

        The tokenizer's path and kind are not compared: its hash is.

        Raises:
            MapetError: naming the first entry that differs.
        """
        difference = self.header.first_difference(wanted)
        if difference:
            name, stored, asked = difference
            raise MapetError(
                f"token store {self.folder} was made with {name} {stored!r}, but {asked!r} is asked for; ask for "
                "the same, or encode into another folder"
            )

    def plan(self, keys: Sequence[str]) -> Rows:
        """Return the row of each key, ``(n,)``; keys that are new get empty rows at the end, in their order.

        From now until ``close`` no other process can append.

        Raises:
            MapetError: if another process appends, or there is no room.
        """
        files = self._writable_files()
        self._acquire()
        with self._explain("written"):
            self._map()  # another process may have appended since this one opened it
            digests = key_digests(keys)
            rows = find(self._records["key"], digests)
            new = rows < 0
            _, first, number = np.unique(digests[new], return_index=True, return_inverse=True)
            # A key that comes twice has one row; np.unique sorts, but rows are in order of first appearance.
            rows[new] = len(self) + np.argsort(np.argsort(first))[number]
            self._append(*files, digests[new][np.sort(first)])
        return rows

    def find(self, keys: Sequence[str]) -> Rows:
        """Return the row of each key, ``(n,)``; -1 for one that has none, or an empty one."""
        rows = find(self._records["key"], key_digests(keys))
        known = rows >= 0
        rows[known] = np.where(self._records["state"][rows[known]] == State.EMPTY, -1, rows[known])
        return rows

    def rows(self, keys: Sequence[str]) -> Rows:
        """Return the row of each key, ``(n,)``.

        Raises:
            MapetError: if keys have no row, or an empty one.
        """
        rows = self.find(keys)
        missing = rows < 0
        if missing.any():
            raise MapetError(
                f"{missing.sum()} of {len(keys)} images have no tokens in {self.folder}, the first being "
                f"{keys[int(missing.argmax())]!r}; append them with: mapet tokenizer encode"
            )
        return rows

    def pending(self, rows: Rows, digests: Digests | None = None) -> NDArray[np.bool_]:
        """Return, as ``(b,)``, which rows are to be written: empty or corrupt ones, and those of changed images.

        Rows of images that could not be decoded are not, until the image changes.

        Args:
            rows: ``(b,)``.
            digests: of the images' content; without them changes are not looked for.
        """
        pending = np.empty(len(rows), np.bool_)
        for part in self._parts(len(rows)):
            records = self._records[rows[part]]
            pending[part] = ~self._whole(records, self._ids[rows[part]])
            if digests is not None:
                pending[part] |= records["content"] != as_digests(digests[part])
        return pending

    def damaged(self, rows: Rows) -> NDArray[np.bool_]:
        """Return, as ``(b,)``, which rows are of images that could not be decoded."""
        return np.asarray(self._records["state"][rows] == State.DAMAGED)

    def write(self, rows: Rows, digests: Digests, ids: Tensor) -> None:
        """Write the ids of images.

        Args:
            rows: ``(b,)``; no other process may write them at the same time.
            digests: of the images' content.
            ids: ``(b, K, P)`` integers in ``[0, V)``.

        Raises:
            MapetError: if the ids are not such, or cannot be written.
        """
        values = ids.cpu().numpy()
        if values.shape != (len(rows), *self.header.shape):
            raise MapetError(
                f"ids of shape {values.shape} do not fit {len(rows)} rows of token store {self.folder}, which holds "
                f"{self.header.shape[0]} views of {self.header.shape[1]} patches"
            )
        if values.size and not 0 <= values.min() <= values.max() < self.header.vocab_size:
            raise MapetError(
                f"ids from {values.min()} to {values.max()} do not fit token store {self.folder}, made for a tokenizer "
                f"of {self.header.vocab_size}; encode with that one"
            )
        self._put(rows, digests, State.WRITTEN, values.astype(self.header.dtype))

    def mark_damaged(self, rows: Rows, digests: Digests) -> None:
        """Write down that images, by rows and digests as for ``write``, cannot be decoded."""
        self._put(rows, digests, State.DAMAGED, np.zeros((len(rows), *self.header.shape), self.header.dtype))

    def read(self, rows: Rows, views: NDArray[np.int64], digests: Digests, keys: Sequence[str]) -> Tensor:
        """Return the ids of a view of each image, ``(b, P)`` int64.

        Args:
            rows: ``(b,)``.
            views: which of the K views, ``(b,)``.
            digests: of the content that the images have now.
            keys: of the images, for the message.

        Raises:
            MapetError: naming an image that changed since its ids were made, or whose row is not whole.
        """
        records, ids = self._records[rows], self._ids[rows, views]
        fits = checksums(records, ids[:, None])[:, 0] == records["crc"][np.arange(len(rows)), views]
        same = records["content"] == as_digests(digests)
        good = fits & same & (records["state"] == State.WRITTEN)
        if not good.all():
            bad = int(good.argmin())
            if records["state"][bad] == State.EMPTY:
                reason = "has no tokens yet"
            elif not fits[bad]:
                reason = "has tokens that fail their checksum"
            elif not same[bad]:
                reason = "changed since its tokens were made"
            else:
                reason = "could not be decoded when its tokens were to be made"
            raise MapetError(
                f"image {keys[bad]!r} {reason} (token store {self.folder}); bring it up to date with: "
                "mapet tokenizer encode"
            )
        return torch.from_numpy(ids.astype(np.int64))

    def verify(self) -> Report:
        """Look at every row's state and checksums, from the disk and not from the maps, a chunk at a time."""
        found = np.zeros(len(State), np.int64)
        corrupt = [np.empty(0, np.int64)]
        with self._explain("read"):
            for part in self._parts(len(self)):
                records, ids = self._from_disk(part)
                whole, empty = self._whole(records, ids), records["state"] == State.EMPTY
                found += np.bincount(records["state"][whole | empty], minlength=len(State))
                corrupt.append(np.flatnonzero(~whole & ~empty) + part.start)
        return Report(
            rows=len(self),
            written=int(found[State.WRITTEN]),
            damaged=int(found[State.DAMAGED]),
            empty=int(found[State.EMPTY]),
            corrupt=np.concatenate(corrupt),
        )

    def _map(self) -> None:
        """Map as many rows as the index says there are; what lies behind them is left from a killed ``plan``."""
        index, ids = self.folder / INDEX_FILE, self.folder / IDS_FILE
        with index.open("rb") as file:
            preamble = file.read(PREAMBLE.size)
        if len(preamble) < PREAMBLE.size:
            raise self._cut_short(index, len(preamble), PREAMBLE.size)
        magic, rows, digest = PREAMBLE.unpack(preamble)
        if magic != MAGIC:
            raise MapetError(f"{index} is not the index of a token store; put the original back or encode again")
        if digest != self.header.digest:
            raise changed(self.folder / HEADER_FILE)
        for path, needed in ((index, PREAMBLE.size + rows * self._record_type.itemsize), (ids, rows * self._row_bytes)):
            if path.stat().st_size < needed:
                raise self._cut_short(path, path.stat().st_size, needed)
        self._records = _mapped(index, self._record_type, (rows,), PREAMBLE.size)
        self._ids = _mapped(ids, self.header.dtype, (rows, *self.header.shape), 0)

    def _cut_short(self, path: Path, size: int, needed: int) -> MapetError:
        return MapetError(
            f"token store {self.folder} was cut short: {path.name} has {size} bytes instead of {needed}; copy it again "
            "or encode into another folder"
        )

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise MapetError(
                f"token store {self.folder} is being written by another process; wait for it or choose another folder"
            ) from None
        except (NotImplementedError, OSError) as error:
            logger.warning("token store %s cannot be locked (%s); let no other process append", self.folder, error)

    def _append(self, index: int, ids: int, digests: NDArray[Any]) -> None:
        """Add empty rows for keys' digests.

        The number of rows in the index is written last: until then there are none of them.
        """
        rows, total = len(self), len(self) + len(digests)
        records = np.zeros(len(digests), self._record_type)
        records["key"] = digests
        end = PREAMBLE.size + rows * self._record_type.itemsize
        os.ftruncate(index, end)
        os.ftruncate(ids, total * self._row_bytes)
        _write_at(index, records.view(np.uint8).data, end)
        for file in (index, ids):
            os.fsync(file)
        _write_at(index, PREAMBLE.pack(MAGIC, total, self.header.digest), 0)
        os.fsync(index)
        self._map()

    def _put(self, rows: Rows, digests: Digests, state: State, ids: NDArray[Any]) -> None:
        """Write rows and, once these are on the disk, their records.

        Not through maps, which end the process with SIGBUS when the disk is full.
        """
        records = self._records[rows]
        records["content"], records["state"] = as_digests(digests), state
        records["crc"] = checksums(records, ids)
        index_file, ids_file = self._writable_files()
        with self._explain("written"):
            for row, values in zip(rows.tolist(), ids, strict=True):
                _write_at(ids_file, values.tobytes(), row * self._row_bytes)
            os.fsync(ids_file)
            for row, record in zip(rows.tolist(), records, strict=True):
                _write_at(index_file, record.tobytes(), PREAMBLE.size + row * self._record_type.itemsize)

    def _whole(self, records: NDArray[Any], ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Return, as ``(n,)``, which rows are of written or damaged images and fit their checksums."""
        known: NDArray[np.bool_] = (records["state"] == State.WRITTEN) | (records["state"] == State.DAMAGED)
        known &= (checksums(records, ids) == records["crc"]).all(1)
        return known

    def _parts(self, count: int) -> Iterator[slice]:
        """Cut ``count`` rows into chunks of about ``CHUNK_BYTES``."""
        size = max(1, CHUNK_BYTES // (self._row_bytes + self._record_type.itemsize))
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _from_disk(self, part: slice) -> tuple[NDArray[Any], NDArray[Any]]:
        """Read neighbouring rows' records ``(n,)`` and ids ``(n, K, P)``."""
        count = part.stop - part.start
        offset = PREAMBLE.size + part.start * self._record_type.itemsize
        records = np.fromfile(self.folder / INDEX_FILE, self._record_type, count, offset=offset)
        values, offset = count * self._row_bytes // self.header.dtype.itemsize, part.start * self._row_bytes
        ids = np.fromfile(self.folder / IDS_FILE, self.header.dtype, values, offset=offset)
        return records, ids.reshape(count, *self.header.shape)

    def _writable_files(self) -> tuple[int, int]:
        """Return the descriptors of the index and the ids."""
        if self._files is None:
            raise MapetError(f"token store {self.folder} is open for reading only; open it with writable=True")
        return self._files

    @contextmanager
    def _explain(self, what: str) -> Iterator[None]:
        """Turn the system's refusals into one clear sentence."""
        try:
            yield
        except OSError as error:
            raise MapetError(
                f"token store {self.folder} cannot be {what} ({error}); remove the cause and run it again"
            ) from error


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> NDArray[Any]:
    if not shape[0]:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    # A plain array over the map: np.memmap does some work of its own at each indexing.
    return np.memmap(path, dtype, "r", offset, shape).view(np.ndarray)


def _write_at(file: int, content: bytes | memoryview, offset: int) -> None:
    left = memoryview(content)
    while left:  # the system may take only a part, as when the disk is nearly full
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
