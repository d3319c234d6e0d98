from __future__ import annotations

import hashlib
import json
import resource
import shutil
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mapet import MapetError
from mapet.tokenstore.header import Header
from mapet.tokenstore.store import TokenStore

HEADER = Header("tokenizers/a", "pixels", "ab" * 32, (2, 3), 300, {"size": 28, "crop_min": 0.4}, views=2, seed=7)
KEYS = ["b/1.png", "a/1.png", "caf\udce9.png"]


def digests(contents: Sequence[str]) -> Any:
    joined = b"".join(hashlib.sha256(content.encode(errors="surrogateescape")).digest() for content in contents)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def ids_of(contents: Sequence[str], header: Header = HEADER) -> torch.Tensor:
    """Ids ``(b, K, P)`` that follow from the contents."""
    seeds = [int.from_bytes(hashlib.sha256(c.encode(errors="surrogateescape")).digest()[:4]) for c in contents]
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    ids = [torch.randint(header.vocab_size, header.shape, generator=draw) for draw in draws]
    return torch.stack(ids) if ids else torch.empty(0, *header.shape, dtype=torch.long)


def filled(folder: Path, keys: Sequence[str] = KEYS, header: Header = HEADER) -> Path:
    """A store in which every image's content is its key."""
    with TokenStore.create(folder, header) as store:
        store.write(store.plan(keys), digests(keys), ids_of(keys, header))
    return folder


def read(store: TokenStore, keys: Sequence[str], views: Sequence[int] | None = None) -> torch.Tensor:
    rows = store.rows(keys)
    return store.read(rows, np.array(views or [0] * len(keys)), digests(keys), keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path / "store")


@pytest.mark.parametrize(("vocab_size", "size"), [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 4), (1 << 32, 4)])
def test_ids_come_back_from_the_smallest_type_that_holds_them(vocab_size: int, size: int, tmp_path: Path) -> None:
    header = replace(HEADER, vocab_size=vocab_size)
    ids = ids_of(KEYS, header)
    ids[1, 1, 4] = vocab_size - 1
    with TokenStore.create(tmp_path / "store", header) as store:
        store.write(store.plan(KEYS), digests(KEYS), ids)
    assert (tmp_path / "store" / "ids.bin").stat().st_size == 3 * 2 * 6 * size
    store = TokenStore.open(tmp_path / "store")
    assert store.header == header
    assert len(store) == 3
    found = read(store, [KEYS[1], KEYS[2], KEYS[1]], views=[1, 0, 0])
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.stack([ids[1, 1], ids[2, 0], ids[1, 0]]))


def test_keys_keep_their_rows_in_order_of_first_appearance(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "store", HEADER) as store:
        assert store.plan([]).tolist() == []
        assert store.plan(["c", "a", "c", "b"]).tolist() == [0, 1, 0, 2]
        assert store.plan(["e", "b", "d", "e"]).tolist() == [3, 2, 4, 3]
    with TokenStore.open(tmp_path / "store", writable=True) as store:
        assert store.plan(["z", "d", "a"]).tolist() == [5, 4, 1]
        assert len(store) == 6


def test_keys_without_tokens_are_named(folder: Path) -> None:
    with pytest.raises(MapetError, match=r"2 of 4 images have no tokens.*'x\.png'.*mapet tokenizer encode"):
        TokenStore.open(folder).rows([KEYS[0], "x.png", KEYS[1], "y.png"])
    with TokenStore.open(folder, writable=True) as store:
        store.plan(["x.png"])
    with pytest.raises(MapetError, match=r"1 of 2 images have no tokens.*'x\.png'"):
        TokenStore.open(folder).rows([KEYS[0], "x.png"])
    with TokenStore.create(folder.with_name("empty"), HEADER) as store:
        with pytest.raises(MapetError, match=r"3 of 3 .*'b/1\.png'"):
            store.rows(KEYS)


def overwrite(file: Path, offset: int, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(content)


def test_pending_rows_are_empty_corrupt_or_changed(folder: Path) -> None:
    keys = [*KEYS, "new.png", "odd.png"]
    with TokenStore.open(folder, writable=True) as store:
        rows = store.plan(keys)
        assert store.pending(rows).tolist() == [False, False, False, True, True]
        store.mark_damaged(rows[4:], digests(keys[4:]))
        assert store.damaged(rows).tolist() == [False, False, False, False, True]
        assert store.pending(rows, digests(keys)).tolist() == [False, False, False, True, False]
        now = ["edited", *keys[1:4], "repaired"]
        assert store.pending(rows, digests(now)).tolist() == [True, False, False, True, True]
        overwrite(folder / "ids.bin", store.header.dtype.itemsize * 12 * 2, b"\xff")
        assert store.pending(rows, digests(now)).tolist() == [True, False, True, True, True]
        store.write(rows, digests(now), ids_of(now))
        assert not store.pending(rows, digests(now)).any()
        assert torch.equal(store.read(rows, np.zeros(5, np.int64), digests(now), keys), ids_of(now)[:, 0])


def test_rows_that_are_not_whole_are_refused(folder: Path) -> None:
    with TokenStore.open(folder, writable=True) as store:
        rows = store.plan([*KEYS, "new.png", "odd.png"])
        store.mark_damaged(rows[4:], digests(["odd.png"]))
    store = TokenStore.open(folder)

    def refused(row: int, content: str, match: str, view: int = 0) -> None:
        with pytest.raises(MapetError, match=match):
            contents = [KEYS[0], content]
            store.read(np.array([0, row]), np.array([0, view]), digests(contents), ["first.png", "second.png"])

    refused(1, "edited", r"'second\.png' changed since its tokens were made.*mapet tokenizer encode")
    refused(3, "new.png", r"'second\.png' has no tokens yet")
    refused(4, "odd.png", r"'second\.png' could not be decoded when its tokens were to be made")
    overwrite(folder / "ids.bin", store.header.dtype.itemsize * (12 + 6), b"\xff\xff")
    refused(1, KEYS[1], r"'second\.png' has tokens that fail their checksum", view=1)
    assert torch.equal(read(store, KEYS), ids_of(KEYS)[:, 0]), "the other view is whole"


def test_what_is_written_must_fit(folder: Path) -> None:
    before = (folder / "ids.bin").read_bytes()
    with TokenStore.open(folder, writable=True) as store:
        rows = store.plan(KEYS)
        for wrong in (300, -1):
            with pytest.raises(MapetError, match=rf"ids from .*{wrong}.* do not fit .* tokenizer of 300"):
                store.write(rows, digests(KEYS), ids_of(KEYS).index_fill(2, torch.tensor([3]), wrong))
        with pytest.raises(MapetError, match=r"shape \(3, 1, 6\) do not fit 3 rows .* 2 views of 6 patches"):
            store.write(rows, digests(KEYS), ids_of(KEYS)[:, :1])
    reader = TokenStore.open(folder)
    for write in (lambda: reader.plan(["new"]), lambda: reader.mark_damaged(rows, digests(KEYS))):
        with pytest.raises(MapetError, match="open for reading only"):
            write()
    assert (folder / "ids.bin").read_bytes() == before


def test_verify_tells_every_row_apart(folder: Path) -> None:
    with TokenStore.open(folder, writable=True) as store:
        rows = store.plan([*KEYS, "new.png", "odd.png", "last.png"])
        store.mark_damaged(rows[4:5], digests(["odd.png"]))
        store.write(rows[5:], digests(["last.png"]), ids_of(["last.png"]))
    overwrite(folder / "ids.bin", 24 * 1 + 3, b"\x07")
    overwrite(folder / "ids.bin", 24 * 5, b"\xff\xff")
    report = TokenStore.open(folder).verify()
    assert (report.rows, report.written, report.damaged, report.empty) == (6, 2, 1, 1)
    assert report.corrupt.tolist() == [1, 5]


def test_find_tells_which_images_have_ids(tmp_path: Path) -> None:
    with TokenStore.create(tmp_path / "store", HEADER) as store:
        rows = store.plan(["a", "b", "c"])
        store.write(rows[1:2], digests(["b"]), ids_of(["b"]))
        store.mark_damaged(rows[2:], digests(["c"]))
        assert store.find(["c", "x", "b", "a"]).tolist() == [2, -1, 1, -1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer_hash": "cd" * 32}, f"tokenizer_hash '{'ab' * 32}', but '{'cd' * 32}'"),
        ({"grid": (3, 2)}, r"grid \(2, 3\), but \(3, 2\)"),
        ({"vocab_size": 299}, "vocab_size 300, but 299"),
        ({"views": 3}, "views 2, but 3"),
        ({"seed": 8}, "seed 7, but 8"),
        ({"view": {"size": 28, "crop_min": 1.0}}, "view crop_min 0.4, but 1.0"),
        ({"view": {"size": 28, "crop_min": 0.4, "flip": 0.5}}, "view flip None, but 0.5"),
    ],
)
def test_other_ids_than_those_asked_for_are_refused(change: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(MapetError, match=f"{says} is asked for; ask for the same"):
        TokenStore.open(folder).check_header(replace(HEADER, **change))


def test_equal_headers_are_accepted_whatever_the_tokenizers_path(tmp_path: Path) -> None:
    header = replace(HEADER, view={"mean": (0.5, 0.25), "size": 28})
    store = TokenStore.open(filled(tmp_path / "store", header=header))
    store.check_header(replace(header, tokenizer="elsewhere", kind="other"))


@pytest.mark.parametrize(
    "change", [{"vocab_size": 0}, {"vocab_size": (1 << 32) + 1}, {"views": 0}, {"grid": (0, 3)}, {"grid": (3, -1)}]
)
def test_headers_of_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MapetError, match="a token store cannot hold"):
        replace(HEADER, **change)


def test_a_store_is_made_only_where_nothing_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(MapetError, match=r"cannot be made \(Directory not empty\); name a folder that is new or empty"):
        TokenStore.create(folder, HEADER)
    with pytest.raises(MapetError, match="cannot be made"):
        TokenStore.create(tmp_path / "file" / "store", HEADER)
    assert torch.equal(read(TokenStore.open(folder), KEYS), ids_of(KEYS)[:, 0])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "deep" / "empty").mkdir(parents=True)
    TokenStore.create(tmp_path / "deep" / "empty", HEADER).close()
    assert len(TokenStore.open(tmp_path / "deep" / "empty")) == 0


def test_one_process_appends(folder: Path) -> None:
    first, second = (TokenStore.open(folder, writable=True) for _ in range(2))
    assert first.plan(["new"]).tolist() == [3]
    with pytest.raises(MapetError, match="is being written by another process"):
        second.plan(["other"])
    first.close()
    assert second.plan(["other", "new"]).tolist() == [4, 3], "what the first appended is seen"
    second.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "is not of format 1"),
        ('{"format": 2}', "is not of format 1"),
        ('{"format": 1}', "was changed after the store was made"),
        ({"extra": 1}, "was changed"),
        ({"grid": 5}, "was changed"),
        ({"grid": [3, 2]}, "was changed"),
        ({"vocab_size": "300"}, "was changed"),
        ({"vocab_size": 0}, "was changed"),
        ({"vocab_size": 299}, "was changed"),
        ({"tokenizer_hash": "cd" * 32}, "was changed"),
        ({"seed": 8}, "was changed"),
        ({"views": 1}, "was changed"),
        ({"view": {}}, "was changed"),
    ],
)
def test_changed_headers_are_refused(text: str | dict[str, Any], says: str, folder: Path) -> None:
    file = folder / "header.json"
    file.write_text(text if isinstance(text, str) else json.dumps({**json.loads(file.read_text()), **text}))
    with pytest.raises(MapetError, match=rf"header\.json {says}"):
        TokenStore.open(folder)


def test_files_that_are_missing_or_of_other_stores_are_refused(folder: Path, tmp_path: Path) -> None:
    for nowhere in (tmp_path / "none", tmp_path, folder / "ids.bin"):
        with pytest.raises(MapetError, match=r"holds no token store \(header\.json is missing\)"):
            TokenStore.open(nowhere)
    other = filled(tmp_path / "other", ["x", "y", "z"], replace(HEADER, seed=8))
    kin = filled(tmp_path / "kin", ["x", "y", "z"])
    mixed = tmp_path / "mixed"
    for name in ("header.json", "index.bin"):
        shutil.copytree(folder, mixed)
        shutil.copy(other / name, mixed)
        with pytest.raises(MapetError, match="is another store's"):
            TokenStore.open(mixed)
        shutil.rmtree(mixed)
    shutil.copytree(folder, mixed)
    shutil.copy(kin / "ids.bin", mixed)
    with pytest.raises(MapetError, match="fail their checksum"):
        read(TokenStore.open(mixed), KEYS)
    for name in ("index.bin", "ids.bin"):
        (mixed / name).unlink()
        with pytest.raises(MapetError, match=f"cannot be opened .*{name}"):
            TokenStore.open(mixed)
        shutil.copy(folder / name, mixed)


def test_every_cut_is_refused_and_what_lies_behind_the_rows_is_not_looked_at(folder: Path) -> None:
    for name in ("index.bin", "ids.bin"):
        whole = (folder / name).read_bytes()
        for size in range(len(whole)):
            (folder / name).write_bytes(whole[:size])
            with pytest.raises(MapetError, match=rf"cut short: {name} has {size} bytes"):
                TokenStore.open(folder)
        (folder / name).write_bytes(whole + 9 * b"left by a killed plan")
    assert torch.equal(read(TokenStore.open(folder), KEYS), ids_of(KEYS)[:, 0])
    with TokenStore.open(folder, writable=True) as store:
        store.write(store.plan(["new"]), digests(["new"]), ids_of(["new"]))
    same = filled(folder.with_name("same"), [*KEYS, "new"])
    assert contents(folder) == contents(same)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("header.json", "index.bin", "ids.bin")}


def test_a_flipped_bit_never_gives_other_ids(folder: Path) -> None:
    expected, outcomes = ids_of(KEYS)[:, 0], {"right": 0, "refused": 0}
    for name, whole in contents(folder).items():
        for bit in range(0, 8 * len(whole), 5):  # in every byte one or two, each of the eight equally often
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(flipped)
            try:
                assert torch.equal(read(TokenStore.open(folder), KEYS), expected)
                outcomes["right"] += 1
            except MapetError:
                outcomes["refused"] += 1
        (folder / name).write_bytes(whole)
    # A view that is not read, and its checksum, do no harm; nor do JSON's blanks.
    assert outcomes["refused"] > 3 * 8 * (68 + 4 + 12) / 5
    assert outcomes["right"] > 3 * 8 * (12 + 4) / 5


def test_a_full_disk_is_told_and_leaves_whole_rows(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    keys = [f"{number}.png" for number in range(50)]
    with TokenStore.open(folder, writable=True) as store:
        try:
            # As on a full disk, a write that does not fit is cut: here that of the records, of which there are 4028
            # bytes. Python ignores the signal that comes with it.
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            with pytest.raises(MapetError, match=r"cannot be written .*remove the cause and run it again"):
                store.plan(keys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(TokenStore.open(folder)) == 3
        rows = store.plan(keys)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
            with pytest.raises(MapetError, match="cannot be written"):
                store.write(rows, digests(keys), ids_of(keys))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert store.pending(rows).all()
        store.write(rows, digests(keys), ids_of(keys))
    assert contents(folder) == contents(filled(folder.with_name("same"), [*KEYS, *keys]))


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    header = replace(HEADER, grid=(14, 14), vocab_size=8192, views=1)
    keys = [str(number) for number in range(200_000)]
    some = keys[::997]
    with TokenStore.create(tmp_path / "store", header) as store:
        rows = store.plan(keys)
        store.write(rows[::997], digests(some), ids_of(some, header))
    size = sum(len(content) for content in contents(tmp_path / "store").values())
    tracemalloc.start()
    store = TokenStore.open(tmp_path / "store")
    found = store.read(rows[::997], np.zeros(len(some), np.int64), digests(some), some)
    assert tracemalloc.get_traced_memory()[1] < size / 50
    store.verify()
    store.pending(rows)
    assert tracemalloc.get_traced_memory()[1] < size / 3
    tracemalloc.reset_peak()
    store.pending(rows[:1])
    with pytest.raises(MapetError, match="199799 of 200000"):
        store.rows(keys)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - kept < 100 * len(keys)
    assert torch.equal(found, ids_of(some, header)[:, 0])
    overwrite(tmp_path / "store" / "ids.bin", 392 * 997 * 150, b"\xff")
    report = store.verify()
    assert (report.rows, report.written, report.empty) == (len(keys), len(some) - 1, len(keys) - len(some))
    assert report.corrupt.tolist() == [997 * 150]


Call = tuple[list[str], str]


@settings(max_examples=25, deadline=None)
@given(calls=st.lists(st.tuples(st.lists(st.sampled_from("abcdefgh")), st.sampled_from(["write", "damage", "leave"]))))
def test_a_store_is_a_table_of_keys(calls: list[Call], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is planned and written in whatever order, with the store opened anew each time."""
    folder = tmp_path_factory.mktemp("table") / "store"
    TokenStore.create(folder, HEADER).close()
    rows_of: dict[str, int] = {}
    content_of: dict[str, tuple[str, bool]] = {}
    for number, (keys, action) in enumerate(calls):
        now = [f"{key} {number}" for key in keys]
        with TokenStore.open(folder, writable=True) as store:
            rows = store.plan(keys)
            for key in keys:
                rows_of.setdefault(key, len(rows_of))
            assert rows.tolist() == [rows_of[key] for key in keys]
            if action == "write":
                store.write(rows, digests(now), ids_of(now))
            elif action == "damage":
                store.mark_damaged(rows, digests(now))
            if action != "leave":
                content_of |= {key: (content, action == "write") for key, content in zip(keys, now, strict=True)}
    store = TokenStore.open(folder)
    written = [key for key, (_, whole) in content_of.items() if whole]
    now = [content_of[key][0] for key in written]
    found = store.read(store.rows(written), np.ones(len(written), np.int64), digests(now), written)
    assert torch.equal(found, ids_of(now)[:, 1])
    report = store.verify()
    assert (report.rows, report.written, report.damaged) == (len(rows_of), len(written), len(content_of) - len(written))
