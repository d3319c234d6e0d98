from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mapet import MapetError
from mapet.data.decode import decode
from mapet.data.open import open_images, open_labelled, open_test
from mapet.data.sources import few_per_class, split


def test_a_nested_unlabelled_folder_is_found_whole_and_in_order(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "a" / "b")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    shutil.copy(next(digits.rglob("*.png")), tmp_path / ".hidden" / "x.png")
    shutil.copy(next(digits.rglob("*.png")), tmp_path / "UPPER.PNG")
    images = open_images(str(tmp_path))
    assert len(images) == 61
    assert list(images.keys) == sorted(images.keys)
    assert images.labels is None
    assert images.load(0, 1).shape == (1, 28, 28)


def test_links_to_folders_are_followed_but_not_in_circles(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(digits)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(open_images(str(tmp_path))) == 60


def test_a_list_of_paths(digits: Path, tmp_path: Path) -> None:
    names = sorted(str(path) for path in digits.rglob("*.png"))[:5]
    (tmp_path / "near.png").write_bytes(Path(names[0]).read_bytes())
    (tmp_path / "list.txt").write_text("# comment\n\n" + "\n".join([*names, "near.png"]) + "\n")
    images = open_images(str(tmp_path / "list.txt"))
    assert len(images) == 6
    assert images.load(5, 3).shape == (3, 28, 28)
    (tmp_path / "list.txt").write_text("near.png\n", encoding="utf-8-sig")
    assert open_images(str(tmp_path / "list.txt")).keys == ("near.png",)
    (tmp_path / "list.txt").write_text("x" * 5000 + "\n")
    with pytest.raises(MapetError, match="which does not exist"):
        open_images(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_text("gone.png\n")
    with pytest.raises(MapetError, match=r"names 'gone\.png', which does not exist"):
        open_images(str(tmp_path / "list.txt"))


def test_nothing_to_read_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(MapetError, match="neither a folder"):
        open_images(str(tmp_path / "missing"))
    with pytest.raises(MapetError, match="neither a folder"):
        open_images("x" * 5000)
    with pytest.raises(MapetError, match="did you mean 'fashion-mnist'"):
        open_images("fashion_mnist")
    with pytest.raises(MapetError, match="holds no image"):
        open_images(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(MapetError, match="neither a folder of images, nor an image, nor a text file"):
        open_images(str(tmp_path / "model.bin"))


def test_a_single_image(digits: Path) -> None:
    file = digits / "class 3" / "0.png"
    images = open_images(str(file))
    assert images.keys == ("0.png",)
    assert images.load(0, 1).equal(decode(file, 1))


def test_labelled_folders(digits: Path, tmp_path: Path) -> None:
    train, test = open_labelled(str(digits))
    assert (len(train), len(test)) == (50, 10)
    assert train.classes == tuple(f"class {digit}" for digit in range(10))
    assert sorted(test.labels or ()) == list(range(10))
    assert not set(train.keys) & set(test.keys)
    shutil.copytree(digits, tmp_path / "Train")
    shutil.copytree(digits, tmp_path / "val")
    assert [len(part) for part in open_labelled(str(tmp_path))] == [60, 60]
    shutil.rmtree(tmp_path / "val" / "class 3")
    train, test = open_labelled(str(tmp_path))
    assert test.classes == train.classes, "classes are numbered as in training, those that are absent too"
    assert sorted(set(test.labels or ())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    shutil.rmtree(tmp_path / "Train" / "class 7")
    with pytest.raises(MapetError, match=r"val has images of the class 'class 7', which .*Train does not have"):
        open_labelled(str(tmp_path))


def test_unlabelled_folders_cannot_be_evaluated_on(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=r"'0\.png' lies outside"):
        open_labelled(str(digits / "class 0"))
    shutil.copytree(digits / "class 0", tmp_path / "only")
    with pytest.raises(MapetError, match="single class 'only'"):
        open_labelled(str(tmp_path))


def test_demo_digits_are_balanced_and_apart() -> None:
    train, test = open_labelled("mnist")
    assert (len(train), len(test)) == (4000, 1000)
    assert all((train.labels or ()).count(digit) == 400 for digit in range(10))
    assert not {image.tobytes() for image in train.items} & {image.tobytes() for image in test.items}


def test_few_labels_are_spread_over_the_classes() -> None:
    train = open_labelled("mnist")[0]
    few = few_per_class(train, 10, seed=0)
    assert all((few.labels or ()).count(digit) == 10 for digit in range(10))
    assert few.keys != few_per_class(train, 10, seed=1).keys
    assert set(few.keys) < set(few_per_class(train, 40, seed=0).keys)
    with pytest.raises(MapetError, match=r"class '0' of mnist has 400 image\(s\), fewer than the 401 asked for"):
        few_per_class(train, 401, seed=0)


def test_split_is_seeded_and_by_class() -> None:
    train = open_labelled("mnist")[0]
    first, second = split(train, 0.25, seed=1)
    assert (len(first), len(second)) == (3000, 1000)
    assert split(train, 0.25, seed=1)[1].keys == second.keys
    pairs = split(few_per_class(train, 2, seed=0), 0.2, seed=1)
    assert [len(part) for part in pairs] == [10, 10], "no class without a test image"


def test_fingerprint_follows_names(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "a")
    before = open_images(str(tmp_path / "a")).fingerprint
    assert open_images(str(digits)).fingerprint == before
    (tmp_path / "a" / "class 0" / "0.png").rename(tmp_path / "a" / "class 0" / "zero.png")
    assert open_images(str(tmp_path / "a")).fingerprint != before


def test_images_to_test_on_are_the_test_part_or_all_and_numbered_by_name(digits: Path, tmp_path: Path) -> None:
    classes = [f"class {digit}" for digit in reversed(range(10))]
    images = open_test(str(digits), classes, "the model")
    assert images.classes == tuple(classes)
    assert [classes[label] for label in images.labels or ()] == [key.split("/")[0] for key in images.keys]
    for part in ("train", "val"):
        shutil.copytree(digits / "class 3", tmp_path / part / "class 3")
    (tmp_path / "val" / "class 3" / "0.png").unlink()
    assert len(open_test(str(tmp_path), classes, "the model")) == 5
    assert len(open_test("mnist", [str(digit) for digit in range(10)], "the model")) == 1000
    with pytest.raises(MapetError, match=r"'class 3', which the model does not have"):
        open_test(str(tmp_path), classes[:5], "the model")
