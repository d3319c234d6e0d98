"""Shards: tar files of images, read by random access.

Tar files are what tar, WebDataset and ``mapet data pack`` write. They are read through once, for an index of where each
image lies; from then on an image is one read of a byte range. So a step's images do not depend on how many processes
read them, and a run continues exactly.

The index is a safetensors file with two tensors: ``rows``, one for each image, and ``names``, the UTF-8 bytes of all
names. It is memory-mapped, so all processes share one copy. It lies beside the shards, or in the cache folder, and is
made again when names, sizes or times of the shards change.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mapet.data.demo_sets import CACHE
from mapet.data.names import BUCKET, EXTENSIONS, INDEX, TAR, ending, is_folder
from mapet.data.reading import check_bytes
from mapet.data.sources import ImageSet, Source
from mapet.data.stores import ALL_SHARDS, Bucket, Folder, Shard, Store
from mapet.data.tars import Member, read_members
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

FORMAT = "mapet shard index 1"
SHARD, OFFSET, SIZE, NAME, LENGTH, CLASS = range(6)  # columns of the index; NAME and LENGTH are a range of ``names``
SHARDS_AT_ONCE = 8  # that are read while an index is made


class Index:
    """Where each image lies: a memory-mapped file, opened anew in each process.

    Attributes:
        shards: the tar files.
        classes: the names of the classes; empty if images have none.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        opened: Any = safe_open(file, "np")
        about = json.loads(opened.metadata()[FORMAT])
        self.shards = [Shard(*each) for each in about["shards"]]
        self.classes = tuple(about["classes"])
        self.rows, self.names = opened.get_slice("rows"), opened.get_slice("names")

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.file,)

    def __len__(self) -> int:
        return int(self.rows.get_shape()[0])


@dataclass(frozen=True, eq=False)
class Shards(Source):
    """Images in tar files; their keys are the names of the members."""

    store: Store
    index: Index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def start_method(self) -> str | None:
        """Return how loading processes must be started."""
        return self.store.start_method

    def key(self, index: int) -> str:
        """Return the name of a member."""
        row = self.index.rows[index]
        return bytes(self.index.names[row[NAME] : row[NAME] + row[LENGTH]]).decode(errors="surrogateescape")

    def content(self, index: int, max_bytes: int) -> bytes:
        """Return the bytes of a member."""
        row = self.index.rows[index].tolist()
        check_bytes(row[SIZE], max_bytes)
        return self.store.read(self.index.shards[row[SHARD]], row[OFFSET], row[SIZE])


def is_shards(source: str) -> bool:
    """Return whether a name is that of shards: in a bucket, a tar file, an index, or a folder that holds tar files."""
    if is_folder(source):
        return bool(Folder(Path(source)).shards())
    is_index = Path(source).name.endswith((f"{TAR}{INDEX}", ALL_SHARDS))
    return source.startswith(BUCKET) or ending(source) == TAR or is_index


def open_shards(source: str) -> ImageSet:
    """Open shards: a folder of tar files, one tar file, an index file, or ``s3://BUCKET/PREFIX``.

    The images have labels if each has a ``.cls`` member.

    Raises:
        MapetError: if there are no shards or no images, or a shard is damaged.
    """
    store = find_store(source)
    shards = store.shards()
    if not shards:
        raise MapetError(f"{source} holds no shard; it needs files ending in {TAR}")
    index = _find_index(store, shards) or _make_index(store, shards)
    labels = index.rows[:, CLASS : CLASS + 1][:, 0]
    labelled = index.classes and labels.min() >= 0
    return ImageSet(
        source, Shards(store, index), tuple(labels.tolist()) if labelled else None, index.classes if labelled else ()
    )


def find_store(source: str) -> Store:
    """Return where shards of this name lie."""
    if source.startswith(BUCKET):
        return Bucket(source.rstrip("/"))
    path = Path(source)
    if path.is_dir():
        return Folder(path)
    if path.name == ALL_SHARDS:
        return Folder(path.parent)
    return Folder(path.parent, path.name.removesuffix(INDEX))


def _find_index(store: Store, shards: list[Shard]) -> Index | None:
    """Return the index of exactly these shards; None if there is none."""
    for file in _places(store):
        try:
            index = Index(file)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            continue
        if index.shards == shards:
            return index
    return None


def _places(store: Store) -> list[Path]:
    """Return where an index may lie, the best place first."""
    cached = CACHE / "indexes" / f"{hashlib.sha256(os.fsencode(_absolute(store.url))).hexdigest()[:32]}{INDEX}"
    return [cached] if store.index is None else [store.index, cached]


def _absolute(url: str) -> str:
    return url if url.startswith(BUCKET) else str(Path(url).resolve())


def _make_index(store: Store, shards: list[Shard]) -> Index:
    """Read all shards and write their index.

    Raises:
        MapetError: if a shard is damaged, two images have one name, or there is no image.
    """
    logger.info("reading %d shards of %s, once, for an index", len(shards), store.url)
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as threads:
        members = list(threads.map(lambda shard: read_members(store, shard), shards))
    _check_unique(store, shards, members)
    classes = _sorted_classes({each.label for of_shard in members for each in of_shard if each.label is not None})
    number = {name: position for position, name in enumerate(classes)}
    rows, names = np.empty((sum(map(len, members)), 6), np.int64), bytearray()
    images = ((shard, each) for shard, of_shard in enumerate(members) for each in of_shard)
    for row, (shard, each) in zip(rows, images, strict=True):
        name = each.name.encode(errors="surrogateescape")
        label = -1 if each.label is None else number[each.label]
        row[:] = shard, each.offset, each.size, len(names), len(name), label
        names += name
    if not len(rows):
        raise MapetError(
            f"the shards of {store.url} hold no image (looked for members ending in {' '.join(sorted(EXTENSIONS))})"
        )
    about = json.dumps({"shards": shards, "classes": classes})
    tensors: dict[str, Any] = {"rows": rows, "names": np.frombuffer(names, np.uint8)}
    return Index(_write(save(tensors, {FORMAT: about}), _places(store)))


def _write(content: bytes, places: Iterable[Path]) -> Path:
    """Write a file at the first of several places that can be written to; a kill leaves none."""
    refused: OSError | None = None
    for place in places:
        fresh = place.with_name(f".{place.name}.{os.getpid()}.new")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(content)
            fresh.replace(place)
            return place
        except OSError as error:
            fresh.unlink(missing_ok=True)
            refused = error
    raise MapetError(f"the index of the shards cannot be written ({refused}); free some space")


def _check_unique(store: Store, shards: list[Shard], members: list[list[Member]]) -> None:
    seen: dict[str, str] = {}
    for shard, of_shard in zip(shards, members, strict=True):
        for each in of_shard:
            if each.name in seen:
                raise MapetError(
                    f"shard {store.place(shard)} has an image named {each.name!r}, and so has {seen[each.name]!r}; "
                    "pack them again, each image with a name of its own"
                )
            seen[each.name] = shard.name


def _sorted_classes(names: set[str]) -> list[str]:
    """Sort classes, those that are all numbers by value."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)
