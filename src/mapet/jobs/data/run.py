"""Packing of images into tar files that are read by random access, and the index of such files."""

import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console

from mapet.config.base import settle
from mapet.data.names import EXTENSIONS, TAR, ending
from mapet.data.open import open_images
from mapet.data.shards import is_shards, open_shards
from mapet.data.sources import Arrays, ImageSet
from mapet.data.stores import Folder
from mapet.data.tars import check_member, read_members, sample_of
from mapet.engine.files import explain_disk_errors, new_file
from mapet.engine.runfolder import check_out
from mapet.errors import MapetError
from mapet.jobs.data.config import IndexConfig, PackConfig
from mapet.report.progress import Meter

MIB = 2**20


def index_shards(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make the index of shards, unless it is there and up to date.

    Args:
        values: configuration by key, see ``IndexConfig``; ``data`` is needed.

    Returns:
        JSON-able: ``index`` (its file), ``shards``, ``images`` and ``classes`` (their numbers).

    Raises:
        MapetError: if there are no shards, or one is damaged.
    """
    config = settle(IndexConfig, values)
    if not is_shards(config.data):
        raise MapetError(
            f"{config.data!r} is not shards: neither a folder of tar files, nor one, nor s3://BUCKET/PREFIX"
        )
    return _describe(open_shards(config.data))


def pack_images(values: Mapping[str, Any], out: str | Path, *, console: Console | None = None) -> dict[str, Any]:
    """Pack images into tar files, in order, with their names, bytes and labels, and make the index.

    A shard is written under another name and then renamed. Shards that are there are kept, so that after a kill the
    same call goes on and writes the same bytes as without the kill.

    Args:
        values: configuration by key, see ``PackConfig``; ``data`` is needed.
        out: the folder of the shards.
        console: where progress is shown; None for standard error.

    Returns:
        see ``index_shards``.

    Raises:
        MapetError: if an image cannot be read, or ``out`` holds shards of other images.
    """
    config = settle(PackConfig, values)
    check_out(config.data, out)
    images, folder = open_images(config.data), Folder(Path(out))
    if isinstance(images.source, Arrays):
        raise MapetError(f"{config.data!r} holds pixels and no image files; it is read as fast as shards as it is")
    _check_names(images)
    with explain_disk_errors(folder.root):
        folder.root.mkdir(parents=True, exist_ok=True)
        shard, packed = len(folder.shards()), _count_packed(images, folder)
        with Meter(console or Console(stderr=True), "packing", len(images), packed) as meter:
            while packed < len(images):
                with new_file(folder.root / f"{shard:06}{TAR}") as file:
                    packed = _write_shard(images, packed, config.shard_mib * MIB, file, meter)
                shard += 1
    return _describe(open_shards(str(out)))


def _check_names(images: ImageSet) -> None:
    """Refuse images whose names cannot be those of members: they must be different, relative, and end as images do."""
    seen: set[str] = set()
    for name in images.keys:
        check_member(name, images.name)
        if name in seen or ending(name) not in EXTENSIONS:
            why = "more than once" if name in seen else "which has no ending of an image file"
            raise MapetError(f"{images.name} has the image name {name!r} {why}; give each image a name of its own")
        seen.add(name)


def _count_packed(images: ImageSet, folder: Folder) -> int:
    """Return how many images the shards in a folder hold.

    Raises:
        MapetError: if they are not the first ones of ``images``.
    """
    count = 0
    for number, shard in enumerate(folder.shards()):
        names = [member.name for member in read_members(folder, shard)]
        if shard.name != f"{number:06}{TAR}" or names != list(images.keys[count : count + len(names)]):
            raise MapetError(f"output folder {folder.root} has {shard.name!r} of other images; choose another --out")
        count += len(names)
    return count


def _write_shard(images: ImageSet, first: int, size: int, file: Path, meter: Meter) -> int:
    """Write images from ``first`` on into a tar file until it has ``size`` bytes; return the index of the next one."""
    classes: dict[str, str] = {}
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for index in range(first, len(images)):
            name = images.key(index)
            try:
                _add(tar, name, images.content(index))
            except (OSError, ValueError) as error:
                raise MapetError(f"image {name!r} of {images.name} cannot be read ({error}); remove it") from error
            if images.labels is not None:
                sample, label = sample_of(name), images.classes[images.labels[index]]
                if sample not in classes:
                    _add(tar, f"{sample}.cls", label.encode())
                if classes.setdefault(sample, label) != label:
                    raise MapetError(
                        f"the images of {images.name} named {sample}.* are one WebDataset sample, but of the classes "
                        f"{classes[sample]!r} and {label!r}; let names differ before their first dot"
                    )
            meter.show(index + 1)
            if tar.offset >= size:
                break
    return index + 1


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member with neither time nor owner, so that the same images make the same file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


def _describe(images: ImageSet) -> dict[str, Any]:
    index = images.source.index  # type: ignore[attr-defined]
    return {
        "index": str(index.file),
        "shards": len(index.shards),
        "images": len(images),
        "classes": len(images.classes),
    }
