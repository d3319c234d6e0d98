"""Packing, and pre-training from each kind of source."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import obstore
import pytest
from obstore.store import S3Store
from rich.console import Console
from tests.conftest import QUIET, TINY, StoppingFile, assert_same_run
from tests.data.s3 import BUCKET, s3_server

import mapet
from mapet import MapetError
from mapet.cli import main
from mapet.data import shards
from mapet.data.open import open_images, open_labelled
from mapet.jobs.data.run import index_shards, pack_images

MAE: dict[str, Any] = {**TINY, "vocab_size": None, "objective": "mae", "steps": 6}


@pytest.fixture(scope="module")
def packed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack_images({"data": str(digits)}, out, console=QUIET)
    return out


@pytest.fixture(scope="module")
def from_folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("from folder") / "run"
    mapet.pretrain({**MAE, "data": str(digits)}, out, console=QUIET)
    return out


def test_shards_train_as_the_folder_and_resume_exactly(packed: Path, from_folder: Path, tmp_path: Path) -> None:
    values = {**MAE, "data": str(packed), "workers": 2}
    assert not mapet.pretrain(values, tmp_path / "run", console=Console(file=StoppingFile())).finished
    (packed / "shards.index").unlink()
    assert mapet.pretrain({"workers": 0}, tmp_path / "run", resume=True, console=QUIET).finished
    assert_same_run(tmp_path / "run", from_folder)


def test_a_bucket_with_faults_trains_as_the_folder(
    packed: Path, from_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CACHE", tmp_path / "cache")
    with s3_server(monkeypatch) as proxy:
        obstore.put(S3Store(BUCKET), "000000.tar", packed / "000000.tar")
        proxy.faults.extend(["cut", "503", "", "dribble"] * 4)
        index_shards({"data": f"s3://{BUCKET}"})
        mapet.pretrain({**MAE, "data": f"s3://{BUCKET}", "workers": 1}, tmp_path / "run", console=QUIET)
        assert not proxy.faults
    assert_same_run(tmp_path / "run", from_folder)


def test_a_saved_data_set_trains_as_the_folder(digits: Path, from_folder: Path, tmp_path: Path) -> None:
    keys = open_images(str(digits)).keys
    rows = datasets.Dataset.from_dict({"image": [str(digits / key) for key in keys], "name": keys})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    mapet.pretrain({**MAE, "data": f"hf:{tmp_path / 'saved'}"}, tmp_path / "run", console=QUIET)
    assert_same_run(tmp_path / "run", from_folder)


KILLED_AT = """
import os, signal, sys
from rich.console import Console
from mapet.data import sources
from mapet.jobs.data.run import pack_images

data, root, count = *sys.argv[1:3], int(sys.argv[3])
read = sources.read_file
for killed_at in range(count):
    out = f"{root}/{killed_at}"
    if not (child := os.fork()):
        left = killed_at
        def read_or_die(path, max_bytes):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return read(path, max_bytes)
        sources.read_file = read_or_die
        pack_images({"data": data, "shard_mib": 1}, out, console=Console(quiet=True))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    pack_images({"data": data, "shard_mib": 1}, out, console=Console(quiet=True))
"""


def test_packing_goes_on_after_a_kill(tmp_path: Path) -> None:
    for number in range(7):
        file = tmp_path / "photos" / f"{number}.bmp"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes([number]) * 400_000)
    data = str(tmp_path / "photos")
    pack_images({"data": data, "shard_mib": 1}, tmp_path / "whole", console=QUIET)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("*.tar")}
    assert sorted(whole) == ["000000.tar", "000001.tar", "000002.tar"]
    subprocess.run([sys.executable, "-c", KILLED_AT, data, str(tmp_path), "7"], check=True)
    for killed_at in range(7):
        out = tmp_path / str(killed_at)
        assert {file.name: file.read_bytes() for file in out.glob("*.tar")} == whole
        assert sorted(file.name for file in out.iterdir()) == [*sorted(whole), "shards.index"]


def test_shards_that_are_there_are_kept(packed: Path, digits: Path) -> None:
    inode = (packed / "000000.tar").stat().st_ino
    pack_images({"data": str(digits)}, packed, console=QUIET)
    assert (packed / "000000.tar").stat().st_ino == inode
    with pytest.raises(MapetError, match=r"has '000000\.tar' of other images; choose another --out"):
        pack_images({"data": str(digits / "class 3")}, packed, console=QUIET)


def test_labels_are_packed(digits: Path, tmp_path: Path) -> None:
    keys = [key.replace("/", " ") for key in open_images(str(digits)).keys]
    rows = datasets.Dataset.from_dict(
        {
            "image": [(digits / key).read_bytes() for key in open_images(str(digits)).keys],
            "key": keys,
            "of": [f"kind {key[6]}" for key in keys],
        }
    )
    rows.to_parquet(tmp_path / "digits.parquet")
    source = f"hf:{tmp_path / 'digits.parquet'}?label=of"
    result = pack_images({"data": source}, tmp_path / "shards", console=QUIET)
    assert (result["images"], result["classes"]) == (60, 10)
    for one, other in zip(open_labelled(source), open_labelled(str(tmp_path / "shards")), strict=True):
        assert (one.keys, one.labels, one.classes) == (other.keys, other.labels, other.classes)
        assert one.digest(0).equal(other.digest(0))


def test_commands(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "shards")
    assert main(["data", "pack", str(digits), "--out", out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"index": f"{out}/shards.index", "shards": 1, "images": 60, "classes": 0}
    assert main(["data", "index", out]) == 0
    assert "60 images in 1 shard(s); index: " in capsys.readouterr().err
    with tarfile.open(f"{out}/000000.tar") as tar:
        assert tar.getnames() == list(open_images(str(digits)).keys)


def test_what_cannot_be_packed_or_indexed_is_refused(digits: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "list.txt").write_text(f"{digits}/class 3/0.png\n")
    (tmp_path / "twice.txt").write_text("photos/a.png\nphotos/a.png\n")
    (photos / "a.png").write_bytes(b"")
    for data, reason in (
        (photos / "list.txt", "which leads out of it"),
        (tmp_path / "twice.txt", r"'photos/a\.png' more than once"),
        ("mnist", "holds pixels and no image files"),
    ):
        with pytest.raises(MapetError, match=reason):
            pack_images({"data": str(data)}, tmp_path / "out", console=QUIET)
    with pytest.raises(MapetError, match="lies inside the image folder"):
        pack_images({"data": str(photos)}, photos / "shards", console=QUIET)
    with pytest.raises(MapetError, match="is not shards"):
        index_shards({"data": str(digits)})
    (photos / "a.png").unlink()
    (photos / "a.png").symlink_to("gone")
    with pytest.raises(MapetError, match=r"image 'a\.png' of .* cannot be read .*; remove it"):
        pack_images({"data": str(photos)}, tmp_path / "out", console=QUIET)
    assert not list((tmp_path / "out").iterdir())
