from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapet.tokenstore import records
from mapet.tokenstore.records import DIGEST, as_digests, checksums, find, key_digests, record_type

# Few first bytes, so that many digests are alike in them, and NULs at the end, which numpy likes to strip.
ALIKE = st.builds(
    lambda first, last: bytes([first]) * 8 + bytes(23) + bytes([last]),
    st.sampled_from([0, 1, 255]),
    st.sampled_from([0, 1, 2, 255]),
)


@given(known=st.lists(ALIKE, unique=True), wanted=st.lists(ALIKE))
def test_digests_are_found_though_their_beginnings_are_alike(known: list[bytes], wanted: list[bytes]) -> None:
    expected = [known.index(digest) if digest in known else -1 for digest in wanted]
    assert find(np.array(known, DIGEST), np.array(wanted, DIGEST)).tolist() == expected


def test_many_digests_are_looked_up_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SOUGHT", 7)
    known = key_digests([str(number) for number in range(100)])
    assert find(known[:90], known[::-1]).tolist() == [*[-1] * 10, *range(89, -1, -1)]


def test_a_checksum_is_over_the_record_and_one_views_ids() -> None:
    rows = np.zeros(2, record_type(3))
    rows["key"], rows["state"] = key_digests(["a", "b"]), 1
    rows["content"] = as_digests(np.arange(64, dtype=np.uint8).reshape(2, 32))
    ids = np.arange(24, dtype="<u2").reshape(2, 3, 4)
    found = checksums(rows, ids)
    assert found.shape == (2, 3)
    assert found[1, 2] == zlib.crc32(rows[1].tobytes()[:68] + ids[1, 2].tobytes())
    assert len(np.unique(found)) == 6
