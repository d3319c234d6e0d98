"""Shards on an S3-compatible server, through a network that fails."""

import sys
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store
from tests.data.s3 import BUCKET, FaultProxy, s3_server

from mapet import MapetError
from mapet.data import shards, stores
from mapet.data.batches import ViewDataset, in_order, load_batches
from mapet.data.open import open_images, open_labelled
from mapet.data.reading import Reading
from mapet.data.stores import StoreError
from mapet.data.views import PlainView
from mapet.jobs.data.run import pack_images

SOURCE, OBJECT = "s3://photos/some digits", "some digits/000000.tar"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultProxy]:
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as proxy:
        yield proxy


@pytest.fixture
def proxy(server: FaultProxy, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A server with the digits in a tar file."""
    monkeypatch.setattr(shards, "CACHE", tmp_path / "cache")
    pack_images({"data": str(digits)}, tmp_path / "shards")
    store = S3Store(BUCKET)
    obstore.put(store, OBJECT, tmp_path / "shards" / "000000.tar")
    obstore.put(store, "some digits/notes.txt", b"no shard")
    yield server
    server.faults.clear()
    server.fault = ""


def test_a_bucket_is_the_folder_that_was_packed(proxy: FaultProxy, digits: Path) -> None:
    folder, images = open_images(str(digits)), open_images(SOURCE)
    assert images.fingerprint == folder.fingerprint
    assert images.digest(17).equal(folder.digest(17))
    assert open_labelled(SOURCE)[1].keys == open_labelled(str(digits))[1].keys
    reads = proxy.reads
    assert open_images(SOURCE).keys == open_images(f"{SOURCE}/").keys == folder.keys
    assert proxy.reads == reads, "the index is in the cache"
    assert open_images(f"{SOURCE}/000000.tar").keys == folder.keys


def test_an_object_that_changed_is_indexed_anew(proxy: FaultProxy, digits: Path, tmp_path: Path) -> None:
    open_images(SOURCE)
    pack_images({"data": str(digits / "class 3")}, tmp_path / "other")
    obstore.put(S3Store(BUCKET), OBJECT, tmp_path / "other" / "000000.tar")
    assert len(open_images(SOURCE)) == 6


@pytest.mark.parametrize("fault", ["cut", "503", "dribble", "stall"])
def test_faults_are_survived(fault: str, proxy: FaultProxy, digits: Path) -> None:
    images = open_images(SOURCE)
    proxy.faults.append(fault)
    assert images.content(3) == open_images(str(digits)).content(3)
    assert not proxy.faults


@pytest.mark.parametrize("fault", ["cut", "503"])
def test_lasting_faults_name_the_object(fault: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(SOURCE)
    monkeypatch.setattr(stores, "RETRIES", {"max_retries": 1})
    stores._client.cache_clear()
    proxy.fault, reads = fault, proxy.reads
    view = PlainView((28, 28), (0.5,), (0.5,))
    with pytest.raises(
        StoreError, match=r"^s3://photos/some digits/000000\.tar cannot be read \(.+\); check the network"
    ):
        next(load_batches(ViewDataset(images, view, Reading(1)), in_order(8, 8), workers=0))
    assert proxy.reads == reads + 2
    stores._client.cache_clear()


def test_a_loading_process_reads_and_fails_in_one_sentence(proxy: FaultProxy, digits: Path) -> None:
    """Its threads would not survive a fork of this process, which has read from the bucket."""
    view, images = PlainView((28, 28), (0.5,), (0.5,)), open_images(SOURCE)
    proxy.faults.extend(["cut", "503"])
    keys = [[(0, 5), (0, 9)], [(0, 7)]] + [[(0, 8)]] * 9
    batches = load_batches(ViewDataset(images, view, Reading(1)), keys, workers=1)
    (batch, expected) = (
        next(each)
        for each in (batches, load_batches(ViewDataset(open_images(str(digits)), view, Reading(1)), keys[:1], 0))
    )
    assert batch["images"].equal(expected["images"])
    obstore.delete(S3Store(BUCKET), OBJECT)
    with pytest.raises(StoreError) as caught:
        list(batches)
    assert str(caught.value).startswith("s3://photos/some digits/000000.tar cannot be read (")
    assert "Traceback" not in str(caught.value)


def test_folders_are_parts(proxy: FaultProxy, digits: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        obstore.put(S3Store(BUCKET), f"of parts/{part}/000000.tar", tmp_path / "shards" / "000000.tar")
    assert [len(part) for part in open_labelled("s3://photos/of parts")] == [60, 60]


def test_wrong_names_are_refused(proxy: FaultProxy) -> None:
    with pytest.raises(MapetError, match="s3://photos/none holds no shard"):
        open_images("s3://photos/none")
    with pytest.raises(MapetError, match=r"s3://nobody/x cannot be read \(.*404"):
        open_images("s3://nobody/x")


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MapetError, match=r"s3:// needs the package obstore: pip install 'mapet\[s3\]'"):
        open_images("s3://photos/x")
