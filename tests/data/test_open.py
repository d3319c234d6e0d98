import shutil
from pathlib import Path

import pytest

from mapet import MapetError
from mapet.data.open import few_per_class, labels_to_use, open_labelled, open_test, split
from mapet.data.reading import Reading


def test_a_fifth_of_each_class_is_held_out(digits: Path) -> None:
    train, test = open_labelled(str(digits))
    assert (len(train), len(test)) == (50, 10)
    assert train.classes == tuple(f"class {digit}" for digit in range(10))
    assert sorted(test.labels or ()) == list(range(10))
    assert not set(train.keys) & set(test.keys)


def test_folders_with_parts(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "Train")
    shutil.copytree(digits, tmp_path / "val")
    assert [len(part) for part in open_labelled(str(tmp_path))] == [60, 60]
    shutil.rmtree(tmp_path / "val" / "class 3")
    train, test = open_labelled(str(tmp_path))
    assert test.classes == train.classes, "the test part's classes are numbered as the training part's"
    assert sorted(set(test.labels or ())) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    shutil.rmtree(tmp_path / "Train" / "class 7")
    with pytest.raises(MapetError, match=r"val has images of the class 'class 7', which .*Train does not have"):
        open_labelled(str(tmp_path))


def test_folders_without_classes_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(MapetError, match=r"'0\.png' lies outside"):
        open_labelled(str(digits / "class 0"))
    shutil.copytree(digits / "class 0", tmp_path / "only")
    with pytest.raises(MapetError, match="single class 'only'"):
        open_labelled(str(tmp_path))


def test_mnist_is_balanced_and_its_parts_are_disjoint() -> None:
    train, test = open_labelled("mnist", seed=3)
    assert (len(train), len(test)) == (4000, 1000)
    assert all((train.labels or ()).count(digit) == 400 for digit in range(10))
    contents = [{bytes(part.digest(i, Reading(1)).tolist()) for i in range(len(part))} for part in (train, test)]
    assert not contents[0] & contents[1]


def test_test_images_are_the_test_part_or_all_images(digits: Path, tmp_path: Path) -> None:
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


def test_a_number_of_labels_of_each_class() -> None:
    train = open_labelled("mnist")[0]
    few = labels_to_use(train, None, 10, seed=0)
    assert few.keys[:5] == ("50", "53", "119", "182", "187")
    assert all((few.labels or ()).count(digit) == 10 for digit in range(10))
    assert few.keys != few_per_class(train, 10, seed=1).keys
    assert set(few.keys) < set(few_per_class(train, 40, seed=0).keys)
    with pytest.raises(MapetError, match=r"class '0' of mnist has 400 image\(s\), fewer than the 401 asked for"):
        few_per_class(train, 401, seed=0)


def test_a_share_of_each_class_contains_each_smaller_share(digits: Path) -> None:
    train = open_labelled("mnist")[0].subset(range(2000))
    share = labels_to_use(train, 0.1, None, seed=0)
    assert share.keys[:5] == ("0", "1", "39", "53", "83")
    for label in range(10):
        assert (share.labels or ()).count(label) == round((train.labels or ()).count(label) / 10)
    assert share.keys != labels_to_use(train, 0.1, None, seed=1).keys
    assert labels_to_use(train, None, None, seed=0) is train
    images = open_labelled(str(digits))[0].subset([0, 5, 6, 7, 8])  # one of the first class, four of the second
    parts = [labels_to_use(images, share, None, seed=0) for share in (0.1, 0.6, 0.9, 1.0)]
    assert [part.labels for part in parts] == [(0, 1), (0, 1, 1), (0, 1, 1, 1, 1), (0, 1, 1, 1, 1)]
    assert set(parts[0].keys) < set(parts[1].keys) < set(parts[2].keys)


def test_split_is_seeded_and_by_class() -> None:
    train = open_labelled("mnist")[0]
    first, second = split(train, 0.25, seed=1)
    assert (len(first), len(second)) == (3000, 1000)
    assert split(train, 0.25, seed=1)[1].keys == second.keys
    parts = split(few_per_class(train, 2, seed=0), 0.2, seed=1)
    assert [len(part) for part in parts] == [10, 10], "each class has an image in both parts"
    with pytest.raises(MapetError, match=r"class '0' of mnist has 1 image\(s\), too few to hold some out"):
        split(few_per_class(train, 1, seed=0), 0.2, seed=1)
