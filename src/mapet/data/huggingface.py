"""Hugging Face data sets: saved ones, files of theirs, and those of the hub. Rows are read from memory-mapped Arrow.

A name is ``hf:WHERE``, or with settings ``hf:WHERE?image=img&label=fine&key=name&split=train&config=small``. WHERE is a
folder written by ``save_to_disk``, a Parquet or Arrow file, or else what ``datasets.load_dataset`` takes: a folder or a
data set of the hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from mapet.data.decode import read_file
from mapet.data.names import HUGGING_FACE, ending
from mapet.data.sources import ImageSet, Source
from mapet.errors import MapetError, nearest, reason_of

KEY_COLUMNS = ("key", "__key__", "name", "file_name", "filename", "path")  # taken for names of images if unique
IMAGE_COLUMNS = ("image", "img")  # taken for images if their type does not say so
TRAIN = "train"


@dataclass(frozen=True)
class Request:
    """What the user asked for: a place, and columns by name."""

    where: str
    image: str | None = None
    label: str | None = None
    key: str | None = None
    split: str | None = None
    config: str | None = None


@dataclass(frozen=True, eq=False)
class Rows(Source):
    """Images in the rows of a data set.

    Attributes:
        rows: a ``datasets.Dataset`` with the one column ``column``, images that are not decoded.
        names: the key of each image.
    """

    rows: Any
    column: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        """Return the name of a row."""
        return self.names[index]

    def content(self, index: int, max_bytes: int) -> bytes:
        """Return the bytes of an image; a row may name a local file instead, but nothing is downloaded."""
        image = self.rows[index][self.column]
        if image is None:
            raise OSError("the row has no image")
        content: bytes | None = image["bytes"]
        return read_file(Path(image["path"]), max_bytes) if content is None else content


def open_splits(source: str) -> dict[str, ImageSet]:
    """Open all splits of a data set, or the one that is asked for, by name; with labels, if there is one label column.

    Raises:
        MapetError: if it cannot be opened, or there are no images.
    """
    request = _parse(source)
    splits = _load(request)
    if request.split is not None:
        if request.split not in splits:
            raise MapetError(f"{source!r} has no split {request.split!r}; it has {', '.join(splits)}")
        splits = {request.split: splits[request.split]}
    return {name: _to_images(rows, request, source) for name, rows in splits.items()}


def open_split(source: str) -> ImageSet:
    """Open the split ``train``, or the only one.

    Raises:
        MapetError: see ``open_splits``; also if there are several others.
    """
    splits = open_splits(source)
    if len(splits) > 1 and TRAIN not in splits:
        raise MapetError(
            f"{source!r} has the splits {', '.join(splits)}; choose one, as hf:...?split={next(iter(splits))}"
        )
    return splits[TRAIN] if TRAIN in splits else next(iter(splits.values()))


def _parse(source: str) -> Request:
    where, _, settings = source.removeprefix(HUGGING_FACE).partition("?")
    given = dict(parse_qsl(settings, keep_blank_values=True))
    known = [field.name for field in fields(Request)][1:]
    for name in given:
        if name not in known:
            raise MapetError(
                f"{source!r} has the unknown setting {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            )
    if not where:
        raise MapetError(f"{source!r} names no data set; write hf:FOLDER or hf:NAME")
    return Request(where, **given)


def _load(request: Request) -> Mapping[str, Any]:
    """Return the data sets of all splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise MapetError("Hugging Face data sets need the package datasets: pip install 'mapet[hf]'") from error
    where = Path(request.where)
    try:
        if ending(request.where) == ".arrow":
            loaded = datasets.Dataset.from_file(request.where)
        elif (where / "dataset_dict.json").is_file() or (where / "state.json").is_file():
            loaded = datasets.load_from_disk(request.where)
        elif ending(request.where) == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=request.where)
        else:
            loaded = datasets.load_dataset(request.where, request.config)
    except Exception as error:  # of pyarrow, the hub or datasets
        raise MapetError(f"Hugging Face data set {request.where!r} cannot be opened: {reason_of(error)}") from error
    return {TRAIN: loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)


def _to_images(rows: Any, request: Request, source: str) -> ImageSet:
    import datasets

    for column in (request.image, request.label, request.key):
        if column is not None and column not in rows.column_names:
            raise MapetError(f"{source!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    image = request.image or _find_image_column(rows, source)
    if len(rows) == 0:
        raise MapetError(f"{source!r} holds no image")
    try:
        encoded = rows.select_columns(image).cast_column(image, datasets.Image(decode=False)).with_format(None)
        encoded[0]
    except Exception as error:  # of pyarrow or datasets
        raise MapetError(f"column {image!r} of {source!r} does not hold image files ({reason_of(error)})") from error
    labels, classes = _read_labels(rows, request, source)
    return ImageSet(source, Rows(encoded, image, _read_names(rows, encoded, image, request, source)), labels, classes)


def _find_image_column(rows: Any, source: str) -> str:
    import datasets

    found = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name in IMAGE_COLUMNS if name in rows.features]
    if len(found) != 1:
        which = (
            f"the image columns {', '.join(found)}" if found else f"no image column among {', '.join(rows.features)}"
        )
        raise MapetError(f"{source!r} has {which}; name one, as hf:...?image=NAME")
    return str(found[0])


def _read_names(rows: Any, encoded: Any, image: str, request: Request, source: str) -> tuple[str, ...]:
    """Return the keys: a column of names, the paths of the images, or the numbers of the rows."""
    candidates = (request.key,) if request.key else (name for name in KEY_COLUMNS if name in rows.features)
    for column in candidates:
        names = rows.select_columns(column).with_format(None)[:][column]
        if _are_keys(names):
            return tuple(names)
        if request.key:
            raise MapetError(f"column {column!r} of {source!r} does not name each image with a text of its own")
    paths = encoded.flatten()[:][f"{image}.path"]
    return tuple(paths if _are_keys(paths) else map(str, range(len(rows))))


def _are_keys(names: list[Any]) -> bool:
    return all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)


def _read_labels(rows: Any, request: Request, source: str) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return labels and classes: of the column that is asked for, or of the only column of classes."""
    import datasets

    found = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    column = request.label or (found[0] if len(found) == 1 else None)
    if column is None:
        return None, ()
    values = rows.select_columns(column).with_format(None)[:][column]
    kind = rows.features[column]
    if isinstance(kind, datasets.ClassLabel):
        known = all(value is not None and value >= 0 for value in values)
        return (tuple(values), tuple(kind.names)) if known else (None, ())
    if not all(isinstance(value, int | str) for value in values):
        raise MapetError(f"column {column!r} of {source!r} is no label: it must hold whole numbers or text in each row")
    classes = sorted(set(values))
    number = {value: position for position, value in enumerate(classes)}
    return tuple(number[value] for value in values), tuple(map(str, classes))
