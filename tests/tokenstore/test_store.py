import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mapet import MapetError
from mapet.tokenstore.store import Header, State, TokenStore

HEADER = Header(
    tokenizer="tokenizers/a",
    tokenizer_hash="ab" * 32,
    grid=(2, 3),
    vocab_size=300,
    view={"size": 28, "crop_min": 0.4},
    views=2,
    seed=7,
)
KEYS = ["b/1.png", "a/1.png", "caf\udce9.png"]


def digests(contents: Sequence[str]) -> Any:
    joined = b"".join(hashlib.sha256(content.encode(errors="surrogateescape")).digest() for content in contents)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def ids_of(contents: Sequence[str], header: Header = HEADER) -> torch.Tensor:
    """Ids ``(b, K, P)`` that follow from the contents."""
    seeds = [int.from_bytes(digest[:4]) for digest in digests(contents)]
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randint(header.vocab_size, header.shape, generator=draw) for draw in draws])


def write(store: TokenStore, keys: Sequence[str], contents: Sequence[str], decoded: bool = True) -> None:
    store.append(keys)
    ids = ids_of(contents, store.header)
    store.write(store.find(keys), digests(contents), ids, np.full(len(keys), decoded))


def filled(folder: Path, keys: Sequence[str] = KEYS, header: Header = HEADER) -> Path:
    """A store in which every image's content is its key."""
    folder.mkdir()
    write(TokenStore.create(folder, header), keys, keys)
    return folder


def read(store: TokenStore, keys: Sequence[str], contents: Sequence[str], view: int = 0) -> torch.Tensor:
    return store.read(store.find(keys), np.full(len(keys), view), digests(contents), keys)


def overwrite(file: Path, offset: int, content: bytes) -> None:
    """Overwrite bytes at an offset from the file's end."""
    with file.open("r+b") as opened:
        opened.seek(-offset, 2)
        opened.write(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path / "store")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "u1"), (256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4"), (1 << 32, "<u4")]
)
def test_ids_have_the_smallest_type(vocab_size: int, dtype: str, tmp_path: Path) -> None:
    header = HEADER.model_copy(update={"vocab_size": vocab_size})
    store = TokenStore(filled(tmp_path / "store", header=header))
    ids = ids_of(KEYS, header)
    ids[1, 1, 4] = vocab_size - 1
    store.write(store.rows(KEYS), digests(KEYS), ids, np.ones(3, bool))
    array = np.load(tmp_path / "store" / "ids.npy")
    assert array.dtype == dtype
    assert np.array_equal(array, ids)
    found = read(TokenStore(tmp_path / "store"), KEYS, KEYS, view=1)
    assert found.dtype == torch.int64
    assert torch.equal(found, ids[:, 1])


def test_missing_ids_are_refused(folder: Path) -> None:
    store = TokenStore(folder)
    with pytest.raises(MapetError, match=r"2 of 4 images have no tokens.*'x\.png'.*mapet tokenizer encode"):
        store.rows([KEYS[0], "x.png", KEYS[1], "y.png"])
    store.append(["x.png"])
    with pytest.raises(MapetError, match=r"1 of 2 images have no tokens.*'x\.png'"):
        store.rows([KEYS[0], "x.png"])


def test_changed_damaged_empty_and_corrupt_rows_are_refused(folder: Path) -> None:
    keys = [*KEYS, "empty.png", "damaged.png"]
    store = TokenStore(folder)
    store.append(keys)
    write(store, keys[4:], keys[4:], decoded=False)

    def refused(key: str, content: str, reason: str) -> None:
        with pytest.raises(MapetError, match=rf"'{key}' {reason}.*mapet tokenizer encode"):
            read(store, [KEYS[1], key], [KEYS[1], content])

    refused("b/1.png", "edited", "changed since its tokens were made")
    refused("empty.png", "empty.png", "has no tokens yet")
    refused("damaged.png", "damaged.png", "could not be decoded when its tokens were to be made")
    row = HEADER.shape[0] * HEADER.shape[1] * 2
    overwrite(folder / "ids.npy", 5 * row, b"\xff\xff")
    refused("b/1.png", "b/1.png", "has tokens that fail their checksum")
    assert torch.equal(read(store, KEYS[1:], KEYS[1:]), ids_of(KEYS[1:])[:, 0])
    assert store.states(np.arange(5)).tolist() == [
        State.CORRUPT,
        State.WRITTEN,
        State.WRITTEN,
        State.EMPTY,
        State.DAMAGED,
    ]
    assert store.unchanged(np.arange(3), digests(["b/1.png", "edited", KEYS[2]])).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer_hash": "cd" * 32}, f"tokenizer_hash '{'ab' * 32}', but '{'cd' * 32}'"),
        ({"grid": (3, 2)}, r"grid \(2, 3\), but \(3, 2\)"),
        ({"vocab_size": 299}, "vocab_size 300, but 299"),
        ({"views": 3}, "views 2, but 3"),
        ({"seed": 8}, "seed 7, but 8"),
        ({"view": {"size": 28, "crop_min": 1.0}, "views": 3}, "view crop_min 0.4, but 1.0"),
        ({"view": {"size": 28, "crop_min": 0.4, "flip": 0.5}}, "view flip None, but 0.5"),
    ],
)
def test_the_first_difference_of_headers_is_named(change: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(MapetError, match=f"{says} is asked for; ask for the same"):
        TokenStore(folder).check_header(HEADER.model_copy(update=change))
    TokenStore(folder).check_header(HEADER.model_copy(update={"tokenizer": "elsewhere"}))


def test_stores_are_made_in_empty_folders_only(tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_text("not ours")
    with pytest.raises(MapetError, match="is not empty and holds no token store; choose another --out"):
        TokenStore.create(tmp_path, HEADER)
    assert (tmp_path / "ids.npy").read_text() == "not ours"
    with pytest.raises(MapetError, match="is not a token store; make one with"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ({"grid": 5}, "is damaged"),
        ({"format": 1, "kind": "pixels"}, "has format 1, not 2; remove the store and encode again"),
        ({"grid": [3, 3]}, "is damaged .*do not fit"),
        ({"vocab_size": 200}, "is damaged .*do not fit"),
    ],
)
def test_damaged_and_old_headers_are_refused(change: str | dict[str, Any], says: str, folder: Path) -> None:
    file = folder / "header.json"
    file.write_text(change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(MapetError, match=says):
        TokenStore(folder)


@pytest.mark.parametrize("name", ["ids.npy", "images.npy"])
def test_files_cut_short_are_refused(name: str, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    for size in range(len(whole)):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises(MapetError, match=rf"{name} is damaged .*; restore it or encode into another folder"):
            TokenStore(folder)
    (folder / name).unlink()
    with pytest.raises(MapetError, match=f"{name} is damaged .*No such file"):
        TokenStore(folder)


def test_files_of_another_store_are_found(folder: Path, tmp_path: Path) -> None:
    filled(tmp_path / "ids", ["x", "y", "z"])
    filled(tmp_path / "seed", header=HEADER.model_copy(update={"seed": 8}))
    for other, name in (("ids", "ids.npy"), ("seed", "header.json")):
        mixed = shutil.copytree(folder, tmp_path / f"mixed {name}")
        shutil.copy(tmp_path / other / name, mixed)
        assert (TokenStore(mixed).states(np.arange(3)) == State.CORRUPT).all()


def test_flipped_bits_never_give_other_ids(folder: Path) -> None:
    expected, refused = ids_of(KEYS)[:, 0], 0
    for name in ("ids.npy", "images.npy"):
        whole = (folder / name).read_bytes()
        for bit in range(0, 8 * len(whole), 5):  # about two bits of every byte
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(flipped)
            try:
                store = TokenStore(folder)
                assert torch.equal(store.read(store.rows(KEYS), np.zeros(3, np.int64), digests(KEYS), KEYS), expected)
            except MapetError:
                refused += 1
        (folder / name).write_bytes(whole)
    assert refused > 3 * (24 + 45) * 8 // 5 - 3


def test_rows_are_appended_and_written_again(folder: Path) -> None:
    store = TokenStore(folder)
    for keys in (["c", "a", "c", KEYS[2]], ["e", "a", "d", "e"]):
        store.append(keys)
    assert store.find([*KEYS, "c", "a", "e", "d", "x"]).tolist() == [0, 1, 2, 3, 4, 5, 6, -1]
    assert torch.equal(read(store, KEYS, KEYS), ids_of(KEYS)[:, 0])
    write(store, [KEYS[1], "d"], ["edited", "d"])
    for opened in (store, TokenStore(folder)):
        keys, contents = [*KEYS, "d"], [KEYS[0], "edited", KEYS[2], "d"]
        assert torch.equal(read(opened, keys, contents, view=1), ids_of(contents)[:, 1])


VIEW = {"crop_min": 0.2, "flip": 0.5, "mirror": False, "views": 2, "channels": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"crop_min": "x"}, "view crop_min: input should be a valid number"),
        ({"crop_min": 5.0}, "view crop_min: input should be less than or equal to 1"),
        ({"channels": -1}, "view channels: input should be greater than or equal to 1"),
        ({"views": 7}, "2 views do not follow from its settings"),
        ({"value_range": [5, 1]}, "view value_range: .*the lower one first"),
        ({"evil": []}, "view evil: extra inputs are not permitted"),
    ],
)
def test_bad_settings_of_views_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    store = TokenStore.create(tmp_path, HEADER.model_copy(update={"view": VIEW}))
    assert store.view_settings.crop_min == 0.2
    (tmp_path / "header.json").write_text(HEADER.model_copy(update={"view": {**VIEW, **change}}).model_dump_json())
    with pytest.raises(MapetError, match=rf"header\.json is damaged \({says}.*restore it or encode"):
        _ = TokenStore(tmp_path).view_settings


@pytest.mark.parametrize("change", [{"grid": [0, 4]}, {"vocab_size": 0}, {"vocab_size": 10**30}, {"views": -1}])
def test_absurd_headers_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    TokenStore.create(tmp_path, HEADER)
    (tmp_path / "header.json").write_text(json.dumps({**HEADER.model_dump(), **change}))
    with pytest.raises(MapetError, match=r"header\.json is damaged"):
        TokenStore(tmp_path)


def test_ids_beyond_the_vocabulary_are_corrupt(tmp_path: Path) -> None:
    """Also with a valid checksum, which whoever changes the ids can compute."""
    store = TokenStore.create(tmp_path, HEADER)
    store.append(["x"])
    row = store.find(["x"])
    ids = torch.full((1, *HEADER.shape), HEADER.vocab_size - 1)
    store.write(row, digests(["x"]), ids, np.array([True]))
    assert store.states(row).tolist() == [State.WRITTEN]
    (tmp_path / "lying").mkdir()
    larger = HEADER.model_copy(update={"vocab_size": HEADER.vocab_size + 5})
    other = TokenStore.create(tmp_path / "lying", larger)
    other._seed = store._seed  # the checksum of the smaller vocabulary
    other.append(["x"])
    other.write(row, digests(["x"]), ids + 1, np.array([True]))
    (tmp_path / "lying" / "header.json").write_text(HEADER.model_dump_json())
    found = TokenStore(tmp_path / "lying")
    assert found.states(row).tolist() == [State.CORRUPT]
    with pytest.raises(MapetError, match="fail their checksum or exceed the vocabulary"):
        found.read(row, np.array([0]), digests(["x"]), ["x"])
