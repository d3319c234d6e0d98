import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest

from mapet import MapetError
from mapet.data import shards as module
from mapet.data.batches import DamageTally, ViewDataset, in_order, load_batches
from mapet.data.open import open_images, open_labelled, open_test
from mapet.data.reading import Reading
from mapet.data.shards import Shards
from mapet.data.sources import ImageSet
from mapet.data.views import PlainView

VIEW = PlainView((28, 28), (0.5,), (0.5,))


def write_tar(file: Path, members: dict[str, bytes], **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def index_of(images: ImageSet) -> Path:
    assert isinstance(images.source, Shards)
    return images.source.index.file


@pytest.fixture
def members(digits: Path) -> dict[str, bytes]:
    """Digits by key, in the order of their folder."""
    return {key: (digits / key).read_bytes() for key in open_images(str(digits)).keys}


@pytest.fixture
def two_shards(members: dict[str, bytes], tmp_path: Path) -> Path:
    first, second = dict(list(members.items())[:25]), dict(list(members.items())[25:])
    write_tar(tmp_path / "shards" / "000000.tar", first)
    write_tar(tmp_path / "shards" / "000001.tar", {**second, "notes.txt": b"no image", "._0.png": b"of a Mac"})
    return tmp_path / "shards"


def test_shards_are_the_folder_they_were_made_of(two_shards: Path, digits: Path) -> None:
    folder, shards = open_images(str(digits)), open_images(str(two_shards))
    assert shards.keys == folder.keys
    assert shards.fingerprint == folder.fingerprint
    for index in (0, 24, 25, 59):
        assert shards.load(index, Reading(1)).equal(folder.load(index, Reading(1)))
        assert shards.digest(index).equal(folder.digest(index))
    for one, other in zip(open_labelled(str(two_shards)), open_labelled(str(digits)), strict=True):
        assert (one.keys, one.labels, one.classes) == (other.keys, other.labels, other.classes)
    copy = pickle.loads(pickle.dumps(shards.source))
    assert copy.content(30, 2**30) == folder.content(30)
    assert len(pickle.dumps(shards.source)) < 1000, "a loading process maps the index, and gets no copy"


def test_one_tar_file_and_an_index_are_sources(two_shards: Path, digits: Path) -> None:
    keys = open_images(str(digits)).keys
    assert open_images(str(two_shards / "000001.tar")).keys == keys[25:]
    assert open_images(str(two_shards / "000001.tar.index")).keys == keys[25:]
    assert open_images(str(index_of(open_images(str(two_shards))))).keys == keys


def test_an_index_is_kept_until_shards_change(two_shards: Path, members: dict[str, bytes]) -> None:
    index = index_of(open_images(str(two_shards)))
    assert index == two_shards / "shards.index"
    inode = index.stat().st_ino
    open_images(str(two_shards))
    assert index.stat().st_ino == inode, "nothing changed, so nothing is written"
    content = next(iter(members.values()))
    write_tar(two_shards / "000002.tar", {"new.png": content})
    assert open_images(str(two_shards)).keys[-1] == "new.png"
    write_tar(two_shards / "000002.tar", {"NEW.png": content})  # of the same size
    os.utime(two_shards / "000002.tar", ns=(1, 1))
    images = open_images(str(two_shards))
    assert images.keys[-1] == "NEW.png"
    for damaged in (b"", index.read_bytes()[:100], b"\xff" * 100):
        index.unlink()
        index.write_bytes(damaged)
        assert open_images(str(two_shards)).keys == images.keys


def test_an_index_lies_in_the_cache_if_not_beside(
    two_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    (two_shards / "shards.index").mkdir()  # root may write to folders without permission
    images = open_images(str(two_shards))
    file = index_of(images)
    assert file.parent == tmp_path / "cache" / "indexes"
    inode = file.stat().st_ino
    assert open_images(str(two_shards)).keys == images.keys
    assert file.stat().st_ino == inode
    assert not list(two_shards.glob(".*"))


def test_images_win_over_tar_files_beside_them(two_shards: Path, digits: Path) -> None:
    shutil.copy(digits / "class 3" / "0.png", two_shards / "photo.png")
    assert open_images(str(two_shards)).keys == ("photo.png",)


def test_labels_of_webdataset(members: dict[str, bytes], tmp_path: Path) -> None:
    contents = list(members.values())[:12]
    samples = {
        f"{i:03}.{kind}": text
        for i in range(12)
        for kind, text in (("cls", str(i % 2 * 10 + 1).encode()), ("png", contents[i]), ("json", b"{}"))
    }
    write_tar(tmp_path / "train" / "a.tar", samples)
    write_tar(tmp_path / "val" / "a.tar", dict(list(samples.items())[:6]))
    train, test = open_labelled(str(tmp_path))
    assert (len(train), len(test)) == (12, 2)
    assert train.classes == ("1", "11")
    assert train.labels == (0, 1) * 6
    assert open_test(str(tmp_path), ("11", "1"), "the model").labels == (1, 0)
    assert len(open_labelled(str(tmp_path / "train" / "a.tar"))[1]) == 2, "a fifth is held out"
    del samples["003.cls"]
    write_tar(tmp_path / "b.tar", samples)
    assert open_images(str(tmp_path / "b.tar")).labels is None
    with pytest.raises(MapetError, match=r"'000\.png' lies outside"):
        open_labelled(str(tmp_path / "b.tar"))
    write_tar(tmp_path / "b.tar", {"000.png": contents[0], "000.cls": b"1\n2"})
    with pytest.raises(MapetError, match=r"'000\.cls' of shard .*b\.tar must hold the name or number of a class"):
        open_images(str(tmp_path / "b.tar"))


def test_parts_in_one_shard_are_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    parts = {f"{part}/{key}": content for part in ("train", "val") for key, content in members.items()}
    with pytest.raises(MapetError, match="holds train and val; pack each into a folder of its own"):
        open_labelled(str(write_tar(tmp_path / "x.tar", parts)))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_any_kind(format: int, members: dict[str, bytes], tmp_path: Path) -> None:
    content = next(iter(members.values()))
    names = ["ü/" + "long" * 60 + ".png", os.fsdecode(b"\xff.PNG"), "a b\n.png"]
    write_tar(tmp_path / "x.tar", {f"./{name}": content for name in names}, format=format)
    images = open_images(str(tmp_path / "x.tar"))
    assert list(images.keys) == names
    assert images.content(2) == content


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:900])


def spoil_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"class 5/0.png")] ^= 1
    file.write_bytes(content)


def spoil_size(file: Path) -> None:
    """A size below zero, at which some versions of Python read for ever."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf())
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file.write_bytes(bytes(header) + bytes(1024))


def zip_up(file: Path) -> None:
    import gzip

    file.write_bytes(gzip.compress(file.read_bytes()))


@pytest.mark.parametrize("spoil", [truncate, spoil_header, spoil_size, zip_up])
def test_damaged_tar_files_are_refused(spoil: object, two_shards: Path) -> None:
    spoil(two_shards / "000001.tar")  # type: ignore[operator]
    reason = r"shard .*000001\.tar is damaged, cut short, or not an uncompressed tar file \(.+\); copy it again"
    with pytest.raises(MapetError, match=reason):
        open_images(str(two_shards))


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png"])
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", {name: b"x"})
    with pytest.raises(MapetError, match=r"x\.tar has an image named .* which leads out of it"):
        open_images(str(file))


def test_other_bad_shards_are_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    content = next(iter(members.values()))
    write_tar(tmp_path / "a" / "1.tar", {"x.png": content})
    write_tar(tmp_path / "a" / "2.tar", {"x.png": content})
    with pytest.raises(MapetError, match=r"2\.tar has an image named 'x\.png', and so has '1\.tar'"):
        open_images(str(tmp_path / "a"))
    with pytest.raises(MapetError, match="hold no image"):
        open_images(str(write_tar(tmp_path / "none.tar", {"x.txt": content})))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MapetError, match="holds no image"):
        open_images(str(tmp_path / "empty"))


def test_links_are_left_out(members: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_tar(tmp_path / "x.tar", {"a.png": next(iter(members.values()))})
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert open_images(str(file)).keys == ("a.png",)
    assert "left out 'b.png'" in caplog.text


def test_members_that_are_no_images_are_named(
    members: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_tar(tmp_path / "x.tar", {**members, "odd.png": b"not an image"})
    images = open_images(str(file))
    tally = DamageTally(images, 0.1)
    for batch in load_batches(ViewDataset(images, VIEW, Reading(1)), in_order(61, 61), workers=0):
        tally.add(batch["damaged"])
    assert "skipped damaged image odd.png (UnidentifiedImageError: not an image of a known format)" in caplog.text
    os.truncate(file, 512)  # while the run goes on
    with pytest.raises(OSError, match=r"x\.tar is cut short"):
        images.content(0)
