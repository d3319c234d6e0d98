"""Tar files of images: what they hold, and where."""

import logging
import tarfile
from pathlib import PurePosixPath
from typing import NamedTuple

from mapet.data.names import EXTENSIONS, ending
from mapet.data.stores import Shard, Store
from mapet.errors import MapetError, reason_of

logger = logging.getLogger(__name__)

BLOCK = 512  # bytes of a block of a tar file
LONGEST_CLASS = 1000  # bytes of a .cls member


class Member(NamedTuple):
    """An image in a shard: its name, where its bytes lie, and its class, if it has a ``.cls`` member."""

    name: str
    offset: int
    size: int
    label: str | None


def read_members(store: Store, shard: Shard) -> list[Member]:
    """Return the images of a shard, in order.

    Raises:
        MapetError: if it is no tar file or damaged, or has a name that leads out of it.
    """
    where = f"shard {store.place(shard)}"
    found: list[Member] = []
    labels: dict[str, str] = {}
    with store.open(shard) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte each, which nobody needs
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
    return [each._replace(label=labels.get(sample_of(each.name))) for each in found]


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
    """Return the name of the WebDataset sample of a member: its name up to the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _read_class(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    opened = tar.extractfile(member)
    text = opened.read(LONGEST_CLASS + 1).decode(errors="replace").strip() if opened else ""
    if not text or len(text) > LONGEST_CLASS or not text.isprintable():
        raise MapetError(f"member {member.name!r} of {where} must hold the name or number of a class, on one line")
    return text
