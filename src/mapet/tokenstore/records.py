"""The index of a token store: a preamble, then a record per row that ties its ids to an image."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"mapet-ix"
PREAMBLE = struct.Struct("<8sQ32s")  # MAGIC, how many rows there are, digest of the header

# A byte string, because numpy does not compare or sort raw bytes. It is compared in full, NULs and all.
DIGEST = np.dtype("S32")

SOUGHT = 1 << 16  # digests looked up together: bounds the memory for those on the way


class State(IntEnum):
    """Of a row: yet to be written, written, or that of an image that could not be decoded."""

    EMPTY = 0
    WRITTEN = 1
    DAMAGED = 2


def record_type(views: int) -> np.dtype[Any]:
    """Return the layout of a record: ``68 + 4 K`` bytes, little-endian.

    The checksums, one per view so that a training step reads only the view that it takes, are over all that stands
    before them in the record and then the view's ids. So a row put together from two images, by a kill or a damaged
    disk, fits none.
    """
    return np.dtype([("key", DIGEST), ("content", DIGEST), ("state", "<u4"), ("crc", "<u4", (views,))])


def key_digests(keys: Sequence[str]) -> NDArray[Any]:
    """Return the SHA-256 of each key as ``(n,)`` ``DIGEST``; names that are no UTF-8 are as good as others."""
    digests = (hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys)
    return np.fromiter(digests, DIGEST, len(keys))


def as_digests(digests: NDArray[np.uint8]) -> NDArray[Any]:
    """Turn ``(n, 32)`` bytes into ``(n,)`` ``DIGEST``."""
    return np.ascontiguousarray(digests, np.uint8).reshape(-1, DIGEST.itemsize).view(DIGEST)[:, 0]


def find(known: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """Return where in ``known`` each digest of ``wanted`` stands, -1 where it does not; both ``(n,)`` ``DIGEST``."""
    # Eight bytes are quicker to sort and to search than 32, and nearly always enough.
    prefixes = _prefixes(known)
    order = prefixes.argsort()
    prefixes = prefixes[order]
    found = np.full(len(wanted), -1)
    for start in range(0, len(wanted), SOUGHT):
        left = np.arange(start, min(start + SOUGHT, len(wanted)))
        places = np.searchsorted(prefixes, _prefixes(wanted[left]))
        while len(left):
            possible = places < len(known)
            possible[possible] = prefixes[places[possible]] == _prefixes(wanted[left[possible]])
            left, places = left[possible], places[possible]
            candidates = order[places]
            same = known[candidates] == wanted[left]
            found[left[same]] = candidates[same]
            left, places = left[~same], places[~same] + 1
    return found


def checksums(records: NDArray[Any], ids: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the CRC-32 ``(n, m)`` that ``n`` records should have for ``(n, m, P)`` ids of their views."""
    head = records.dtype.fields["crc"][1]  # type: ignore[index]
    heads = _bytes(records[:, None, None])[..., :head]
    lines = np.concatenate([np.broadcast_to(heads, (*ids.shape[:2], head)), _bytes(ids)], axis=2)
    lines = np.ascontiguousarray(lines)  # of one patch an image, numpy would lay them out in columns
    rows = lines.view(f"V{lines.shape[2]}").ravel().tolist()
    return np.fromiter(map(zlib.crc32, rows), np.uint32, len(rows)).reshape(ids.shape[:2])


def _prefixes(digests: NDArray[Any]) -> NDArray[np.uint64]:
    return digests.astype("S8").view(np.uint64)


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)
