"""Where shards lie: in a folder, or in a bucket of an S3-compatible store."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from mapet.data.names import BUCKET, INDEX, TAR
from mapet.errors import MapetError, first_line

ALL_SHARDS = f"shards{INDEX}"  # index of the shards of a folder
READ_AHEAD = 2**20  # bytes read from a bucket at a time while an index is made

# Of requests that fail, time out (after 30 s) or break off. obstore doubles the pauses from 0.1 s up to 15 s.
RETRIES: Any = {"max_retries": 10}


class StoreError(MapetError):
    """A store does not answer. The image may be whole, so it is not counted as damaged."""


class Shard(NamedTuple):
    """A tar file: its name in the store, its size in bytes, and what changes when it is written again."""

    name: str
    size: int
    version: str


class Store(Protocol):
    """Stored shards."""

    @property
    def url(self) -> str:
        """Return what the store is called."""

    @property
    def start_method(self) -> str | None:
        """Return how processes that read from it must be started; None for the system's default."""

    @property
    def index(self) -> Path | None:
        """Return the index file beside the shards; None if there can be none."""

    def shards(self) -> list[Shard]:
        """Return the shards, sorted by name."""

    def place(self, shard: Shard) -> str:
        """Return the full path or address of a shard, for messages."""

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Return bytes of a shard.

        Raises:
            OSError: if they cannot be read from a file, or the file is too short.
            StoreError: if they cannot be had from a bucket.
        """

    def open(self, shard: Shard) -> BinaryIO:
        """Open a shard for reading."""


@dataclass(frozen=True)
class Folder:
    """Tar files in a folder and its subfolders.

    Attributes:
        root: the folder.
        only: the name of the one tar file that is meant; None for all.
    """

    root: Path
    only: str | None = None
    start_method = None

    @property
    def url(self) -> str:
        """Return the path of the folder or the tar file."""
        return str(self.root / (self.only or ""))

    @property
    def index(self) -> Path:
        """Return where the index lies."""
        return self.root / (f"{self.only}{INDEX}" if self.only else ALL_SHARDS)

    def shards(self) -> list[Shard]:
        """Return the tar files; hidden files and folders are left out."""
        names = [self.only] if self.only else sorted(self._walk())
        found = [(name, (self.root / name).stat()) for name in names]
        return [Shard(name, stat.st_size, str(stat.st_mtime_ns)) for name, stat in found]

    def _walk(self) -> Iterator[str]:
        for root, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if name.lower().endswith(TAR) and not name.startswith("."):
                    yield (Path(root) / name).relative_to(self.root).as_posix()

    def place(self, shard: Shard) -> str:
        """Return the path of a tar file."""
        return str(self.root / shard.name)

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Return bytes of a tar file."""
        with self.open(shard) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"shard {self.place(shard)} is cut short")
        return content

    def open(self, shard: Shard) -> BinaryIO:
        """Open a tar file; no more is read than is asked for."""
        return (self.root / shard.name).open("rb", buffering=0)


@dataclass(frozen=True)
class Bucket:
    """Objects ending in .tar below ``s3://BUCKET/PREFIX``, or the one object of that name.

    Address and credentials of the store come from the environment (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...).
    The client is opened in each process that reads: its threads do not survive a fork.
    """

    url: str
    start_method = "spawn"
    index = None

    def shards(self) -> list[Shard]:
        """List the tar files."""
        prefix = self._prefix
        folder = prefix.rpartition("/")[0] if prefix.endswith(TAR) else prefix
        with _explained(self.url):
            found = [each for page in _obstore().list(_client(self._name), folder or None) for each in page]
        wanted = [each for each in found if each["path"].endswith(TAR)]
        if prefix.endswith(TAR):
            wanted = [each for each in wanted if each["path"] == prefix]
        versions = [each["e_tag"] or each["last_modified"].isoformat() for each in wanted]
        return sorted(Shard(each["path"], each["size"], v) for each, v in zip(wanted, versions, strict=True))

    def place(self, shard: Shard) -> str:
        """Return the address of an object."""
        return f"{BUCKET}{self._name}/{shard.name}"

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Return a range of an object; requests that fail are repeated, see ``RETRIES``."""
        with _explained(self.place(shard)):
            return bytes(_obstore().get_range(_client(self._name), shard.name, start=offset, length=size))

    def open(self, shard: Shard) -> BinaryIO:
        """Open an object, of which ``READ_AHEAD`` bytes are read at a time."""
        return io.BufferedReader(_Ranges(self, shard), READ_AHEAD)

    def folders(self) -> set[str]:
        """Return the names of the folders directly below the prefix that hold tar files."""
        below = (shard.name.removeprefix(self._prefix).strip("/") for shard in self.shards())
        return {name.partition("/")[0] for name in below if "/" in name}

    @property
    def _name(self) -> str:
        return self.url.removeprefix(BUCKET).partition("/")[0]

    @property
    def _prefix(self) -> str:
        return self.url.removeprefix(BUCKET).partition("/")[2]


class _Ranges(io.RawIOBase):
    """An object as a file."""

    def __init__(self, bucket: Bucket, shard: Shard) -> None:
        self._bucket, self._shard, self._at = bucket, shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._shard.size}[whence]
        return self._at

    def readinto(self, target: Any) -> int:
        size = min(len(target), max(0, self._shard.size - self._at))
        target[:size] = self._bucket.read(self._shard, self._at, size) if size else b""
        self._at += size
        return size


def _obstore() -> Any:
    try:
        import obstore.store
    except ImportError as error:
        raise MapetError(f"{BUCKET} needs the package obstore: pip install 'mapet[s3]'") from error
    return obstore


@cache
def _client(bucket: str) -> Any:
    """Return this process's connection to a bucket."""
    return _obstore().store.S3Store(bucket, retry_config=RETRIES)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn an error of obstore into one sentence that names the object."""
    try:
        yield
    except MapetError:
        raise
    except Exception as error:
        raise StoreError(
            f"{url} cannot be read ({first_line(error)}); check the network, the name and the credentials, then "
            "run the command again"
        ) from error
