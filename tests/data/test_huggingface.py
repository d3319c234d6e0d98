import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from mapet import MapetError
from mapet.data.open import open_images, open_labelled, open_test
from mapet.data.reading import Reading


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def columns(digits: Path) -> dict[str, list[Any]]:
    keys = open_images(str(digits)).keys
    contents = [{"bytes": (digits / key).read_bytes(), "path": key.replace("/", "-")} for key in keys]
    return {"image": contents, "file_name": list(keys), "label": [int(key[6]) for key in keys]}


CLASSES = datasets.ClassLabel(names=[f"class {digit}" for digit in range(10)])


def make(columns: dict[str, list[Any]], *left_out: str) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({name: values for name, values in columns.items() if name not in left_out})
    rows = rows.cast_column("image", datasets.Image())
    return rows.cast_column("label", CLASSES) if "label" in rows.column_names else rows


def test_a_saved_data_set_is_the_folder_it_was_made_of(
    columns: dict[str, list[Any]], digits: Path, tmp_path: Path
) -> None:
    make(columns).save_to_disk(tmp_path / "saved")
    folder, images = open_images(str(digits)), open_images(f"hf:{tmp_path / 'saved'}")
    assert images.fingerprint == folder.fingerprint
    assert images.digest(17).equal(folder.digest(17))
    assert images.load(17, Reading(1)).equal(folder.load(17, Reading(1)))
    for one, other in zip(open_labelled(images.name), open_labelled(str(digits)), strict=True):
        assert (one.keys, one.labels, one.classes) == (other.keys, other.labels, other.classes)


def test_splits_are_parts(columns: dict[str, list[Any]], tmp_path: Path) -> None:
    rows = make(columns)
    splits = {"train": rows.shuffle(seed=0).select(range(50)), "validation": rows.select(range(8))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = f"hf:{tmp_path / 'saved'}"
    train, test = open_labelled(source)
    assert (len(train), len(test), len(open_images(source))) == (50, 8, 50)
    assert train.classes[train.labels[7]] == train.key(7).split("/")[0]  # type: ignore[index]
    assert open_test(source, CLASSES.names, "the model").keys == test.keys
    assert open_images(f"{source}?split=validation").keys == test.keys
    with pytest.raises(MapetError, match="has no split 'dev'; it has train, validation"):
        open_images(f"{source}?split=dev")
    datasets.DatasetDict({"a": splits["train"], "b": splits["validation"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(MapetError, match=r"has the splits a, b; choose one, as hf:\.\.\.\?split=a"):
        open_images(f"hf:{tmp_path / 'other'}")


def test_keys_are_names_paths_or_numbers(columns: dict[str, list[Any]], tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    make(columns).to_parquet(file)
    assert open_images(str(file)).keys == tuple(columns["file_name"])
    make(columns, "file_name").to_parquet(file)
    assert open_images(str(file)).keys[0] == "class 0-0.png"
    columns["image"] = [each["bytes"] for each in columns["image"]]
    make(columns, "file_name").to_parquet(file)
    assert open_images(str(file)).keys[:2] == ("0", "1")
    columns["name"] = ["same"] * 60
    make(columns).to_parquet(file)
    assert open_images(str(file)).keys == tuple(columns["file_name"])
    with pytest.raises(MapetError, match="column 'name' of .* does not name each image with a text of its own"):
        open_images(f"hf:{file}?key=name")


def test_columns_by_name_and_files_without_types(columns: dict[str, list[Any]], tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    contents = [each["bytes"] for each in columns["image"]]
    table = pyarrow.table({"img": contents, "thumbnail": contents, "fine": columns["label"], "kind": list("ab") * 30})
    parquet.write_table(table, tmp_path / "plain.parquet")
    plain = f"hf:{tmp_path / 'plain.parquet'}"
    assert open_images(plain).content(3) == open_images(f"{plain}?image=thumbnail").content(3) == contents[3]
    assert open_labelled(f"{plain}?label=fine")[0].classes == tuple("0123456789")
    assert open_labelled(f"{plain}?label=kind&image=img")[1].classes == ("a", "b")
    with pytest.raises(MapetError, match="has no label for each image"):
        open_labelled(plain)
    for setting, reason in {
        "image=fine": "column 'fine' of .* does not hold image files",
        "label=flavour": "has no column 'flavour'; it has img, thumbnail, fine, kind",
        "lable=fine": "unknown setting 'lable'.*did you mean 'label'",
    }.items():
        with pytest.raises(MapetError, match=reason):
            open_images(f"{plain}?{setting}")


def test_an_arrow_file(columns: dict[str, list[Any]], tmp_path: Path) -> None:
    make(columns).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert open_images(str(file)).keys == tuple(columns["file_name"])


def test_rows_name_local_files_but_nothing_is_fetched(digits: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    paths = [str(digits / "class 3" / "0.png"), "http://127.0.0.1:9/a.png", None]
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    rows = {"image": [path and {"bytes": None, "path": path} for path in paths]}
    parquet.write_table(pyarrow.table(rows, schema), tmp_path / "x.parquet")
    images = open_images(str(tmp_path / "x.parquet"))
    assert images.content(0) == Path(paths[0] or "").read_bytes()
    with pytest.raises(OSError, match="missing, or not a regular file"):
        images.content(1)
    with pytest.raises(OSError, match="the row has no image"):
        images.content(2)


def test_what_cannot_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for source in ("hf:no-such/data-set", str(tmp_path / "bad.parquet")):
        with pytest.raises(MapetError, match="Hugging Face data set '.*' cannot be opened: "):
            open_images(source)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(MapetError, match="no image column among text; name one"):
        open_images(f"hf:{tmp_path / 'text'}")
    with pytest.raises(MapetError, match="names no data set"):
        open_images("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MapetError, match=r"pip install 'mapet\[hf\]'"):
        open_images("hf:photos")
