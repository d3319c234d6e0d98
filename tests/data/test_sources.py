import hashlib
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mapet import MapetError
from mapet.data.decode import decode
from mapet.data.open import open_images
from mapet.data.reading import Reading
from mapet.data.sources import Arrays, ImageSet, Source


class Shard(Source):
    """A tar file of images."""

    def __init__(self, file: Path) -> None:
        self.file, self.reads = file, 0
        with tarfile.open(file) as tar:
            self.members = [member for member in tar.getmembers() if member.isfile()]

    def __len__(self) -> int:
        return len(self.members)

    def key(self, index: int) -> str:
        return self.members[index].name

    def content(self, index: int, max_bytes: int) -> bytes:
        self.reads += 1
        with tarfile.open(self.file) as tar:
            extracted = tar.extractfile(self.members[index])
            assert extracted is not None
            return extracted.read()


@pytest.fixture(params=["files", "tar", "arrays"])
def three(request: pytest.FixtureRequest, digits: Path, tmp_path: Path) -> ImageSet:
    """Three digits of two classes, from each kind of source."""
    if request.param == "files":
        images = open_images(str(digits)).subset([0, 1, 6])
    elif request.param == "tar":
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for name in ("class 0/0.png", "class 0/1.png", "class 1/0.png"):
                tar.add(digits / name, name)
        images = ImageSet("shard.tar", Shard(tmp_path / "shard.tar"))
    else:
        pixels = np.random.default_rng(0).integers(0, 255, (3, 5, 6, 3), np.uint8)
        images = ImageSet("noise", Arrays(pixels))
        assert torch.equal(images.load(1, Reading(3)), torch.tensor(pixels[1]).permute(2, 0, 1))
        assert images.keys == ("0", "1", "2")
    return ImageSet(images.name, images.source, (0, 0, 1), ("zero", "one"), images.indices)


def test_subsets_of_every_source(three: ImageSet) -> None:
    part = three.subset([2, 0]).subset([1, 0])
    assert part.keys == (three.keys[0], three.keys[2]) == (part.key(0), part.key(1))
    assert part.labels == (0, 1)
    assert [part.path(i) for i in range(2)] == [three.path(0), three.path(2)]
    assert torch.equal(part.load(1, Reading(1)), three.load(2, Reading(1)))
    assert not torch.equal(part.load(0, Reading(1)), part.load(1, Reading(1)))
    assert repr(part) == f"2 images of 2 classes from {three.name}"
    assert len(three.subset([])) == 0


def test_image_and_digest_are_read_together(three: ImageSet, digits: Path) -> None:
    image, digest = three.load_with_digest(1, Reading(3))
    if isinstance(three.source, Shard):
        assert three.source.reads == 1
    assert torch.equal(image, three.load(1, Reading(3)))
    assert torch.equal(digest, three.digest(1))
    stored = three.source.content(1, 2**20) if three.source.in_memory else (digits / "class 0" / "1.png").read_bytes()
    assert bytes(digest.tolist()) == hashlib.sha256(stored).digest()


def test_nested_folders(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "a" / "b")
    shutil.copytree(digits / "class 0", tmp_path / "a-c")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    shutil.copy(next(digits.rglob("*.png")), tmp_path / ".hidden" / "x.png")
    shutil.copy(next(digits.rglob("*.png")), tmp_path / "UPPER.PNG")
    (tmp_path / "link").symlink_to(digits / "class 1")
    (tmp_path / "loop").symlink_to(tmp_path)
    images = open_images(str(tmp_path))
    assert len(images) == 73
    assert images.keys[0] == "UPPER.PNG"
    assert list(images.keys) == sorted(images.keys, key=lambda key: key.rpartition("/")[::2])
    assert images.path(1) == tmp_path / images.keys[1]
    assert images.labels is None
    assert repr(images) == f"73 images from {tmp_path}"


def test_lists_of_paths(digits: Path, tmp_path: Path) -> None:
    names = sorted(str(path) for path in digits.rglob("*.png"))[:5]
    (tmp_path / "near.png").write_bytes(Path(names[0]).read_bytes())
    (tmp_path / "list.txt").write_text("# comment\n\n" + "\n".join([*names, "near.png"]) + "\n")
    images = open_images(str(tmp_path / "list.txt"))
    assert images.keys == (*names, "near.png")
    assert images.load(5, Reading(3)).shape == (3, 28, 28)
    (tmp_path / "list.txt").write_text("near.png\n", encoding="utf-8-sig")
    assert open_images(str(tmp_path / "list.txt")).keys == ("near.png",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"gone.png\n", r"names 'gone\.png', which does not exist"),
        (b"x" * 5000, "which does not exist"),
        (b"# comment\n", "names no image"),
        (b"\xff\xd8\xff\xe0", "neither a folder of images, nor an image, nor a text file"),
    ],
)
def test_wrong_lists_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(MapetError, match=reason):
        open_images(str(tmp_path / "list.txt"))


def test_a_single_image(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="holds no image"):
        open_images(str(tmp_path))
    file = Path(shutil.copy(digits / "class 3" / "0.png", tmp_path))
    images = open_images(str(file))
    assert images.keys == ("0.png",)
    assert images.load(0, Reading(1)).equal(decode(file, Reading(1)))


def test_fingerprint_depends_on_the_names_only(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "a")
    images = open_images(str(tmp_path / "a"))
    assert images.fingerprint == hashlib.sha256("\n".join(images.keys).encode()).hexdigest()
    assert open_images(str(digits)).fingerprint == images.fingerprint
    (tmp_path / "a" / "class 0" / "0.png").rename(tmp_path / "a" / "class 0" / "zero.png")
    assert open_images(str(tmp_path / "a")).fingerprint != images.fingerprint
