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
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mapet.data.demo_sets import CACHE
from mapet.data.names import BUCKET, EXTENSIONS, INDEX, TAR, ending, is_folder
from mapet.data.sources import ImageSet, Source
from mapet.data.stores import Bucket, Folder, Shard, Store
from mapet.errors import MapetError, reason_of

logger = logging.getLogger(__name__)

FORMAT = "mapet shard index 1"
SHARD, OFFSET, SIZE, NAME, LENGTH, CLASS = range(6)  # columns of the index; NAME and LENGTH are a range of ``names``
BLOCK = 512  # bytes of a block of a tar file
LONGEST_CLASS = 1000  # bytes of a .cls member
SHARDS_AT_ONCE = 8  # that are read while an index is made

# A WebDataset sample is the files with the same name up to the first dot after the last slash.
SAMPLE = re.compile(r"((?:.*/)?[^/.]*)")


class Member(NamedTuple):
    """An image in a shard: its name, where its bytes lie, and its class, if it has a ``.cls`` member."""

    name: str
    offset: int
    size: int
    label: str | None


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

    def content(self, index: int) -> bytes:
        """Return the bytes of a member."""
        row = self.index.rows[index].tolist()
        return self.store.read(self.index.shards[row[SHARD]], row[OFFSET], row[SIZE])


def is_shards(source: str) -> bool:
    """Return whether a name is that of shards: in a bucket, a tar file, an index, or a folder that holds tar files."""
    if is_folder(source):
        return bool(Folder(Path(source)).shards())
    return source.startswith(BUCKET) or ending(source) in (TAR, INDEX)


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
    if path.suffix == INDEX:
        return Folder(path.parent, path.stem if path.stem.endswith(TAR) else None)
    return Folder(path.parent, path.name)


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
        members = list(threads.map(lambda shard: list(read_members(store, shard)), shards))
    _check_unique(store, shards, members)
    classes = _sorted_classes({each.label for of_shard in members for each in of_shard if each.label is not None})
    number = {name: position for position, name in enumerate(classes)}
    rows, names = [], bytearray()
    for shard, of_shard in enumerate(members):
        for each in of_shard:
            name = each.name.encode(errors="surrogateescape")
            label = -1 if each.label is None else number[each.label]
            rows.append((shard, each.offset, each.size, len(names), len(name), label))
            names += name
    if not rows:
        raise MapetError(
            f"the shards of {store.url} hold no image (looked for members ending in {' '.join(sorted(EXTENSIONS))})"
        )
    about = json.dumps({"shards": shards, "classes": classes})
    tensors: dict[str, Any] = {"rows": np.array(rows, np.int64), "names": np.frombuffer(names, np.uint8)}
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


def read_members(store: Store, shard: Shard) -> Iterator[Member]:
    """Yield the images of a shard, in order.

    Raises:
        MapetError: if it is no tar file or damaged, or has a name that leads out of it.
    """
    where = f"shard {store.place(shard)}"
    found: list[Member] = []
    labels: dict[str, str] = {}
    with store.open(shard) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not 0 <= member.size <= shard.size - member.offset_data:
                        raise tarfile.ReadError(f"member {member.name!r} does not end")
                    name = member.name.removeprefix("./")
                    kind = ending(name)
                    if member.isdir() or (kind not in EXTENSIONS and kind != ".cls") or _is_hidden(name):
                        continue
                    check_member(name, where)
                    if not member.isreg() or member.issparse():
                        logger.warning("left out %r of %s: a link or a sparse file", name, where)
                    elif kind == ".cls":
                        labels[sample_of(name)] = _read_class(tar, member, where)
                    else:
                        found.append(Member(name, member.offset_data, member.size, None))
                end = tar.offset
            file.seek(end)
            # tarfile takes a damaged header for the end of the file, which is a block of zeros or nothing.
            if any(file.read(BLOCK)):
                raise tarfile.ReadError(f"no member begins at byte {end}")
        except (tarfile.TarError, ValueError, ArithmeticError) as error:
            raise MapetError(
                f"{where} is damaged, cut short, or not an uncompressed tar file ({reason_of(error)}); copy it again"
            ) from error
    for each in found:
        yield each._replace(label=labels.get(sample_of(each.name)))


def check_member(name: str, where: str) -> None:
    """Refuse the name of a member that leads out of the archive.

    Raises:
        MapetError: naming it and ``where`` it is.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise MapetError(f"{where} has an image named {name!r}, which leads out of it; pack it with relative names")


def _is_hidden(name: str) -> bool:
    """Return whether a name is left out, as in folders of images."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def sample_of(name: str) -> str:
    """Return the name of the WebDataset sample that a member belongs to."""
    found = SAMPLE.match(name)
    return found[1] if found else name


def _read_class(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    opened = tar.extractfile(member)
    text = opened.read(LONGEST_CLASS + 1).decode(errors="replace").strip() if opened else ""
    if not text or len(text) > LONGEST_CLASS or not text.isprintable():
        raise MapetError(f"member {member.name!r} of {where} must hold the name or number of a class, on one line")
    return text


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
