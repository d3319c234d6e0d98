"""Records of a run, and of the runs that its weights come from; kept in ``origin.json`` and shown by model cards."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mapet.config.base import read_recipe
from mapet.engine.checkpoint import read_state
from mapet.engine.files import replace_file
from mapet.engine.runfolder import RunFolder, run_of
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

# Entries of metrics.jsonl that tell how a run went, not what it achieved.
BOOKKEEPING = frozenset({"step", "epoch", "images", "lr", "grad_norm", "images_per_s", "data_wait", "damaged"})
# Metrics of a single batch, which are averaged over the last records.
AVERAGED = ("loss", "accuracy", "target_loss", "alignment")
LAST_RECORDS = 100


@dataclass(frozen=True)
class RunRecord:
    """What a run folder records of its run, without paths of the machine.

    Attributes:
        config: the resolved configuration.
        images: number of images in the data set; None if there is no checkpoint.
        last: the last record of metrics.jsonl; empty without one.
        metrics: the last value of each metric; those in ``AVERAGED`` are means over the last 100 records.
        baseline: what can be had without looking at the images; empty if not measured.
        results: of an evaluation; empty if there was none.
        origin: the record of the run that this run began with, and its name as ``run``; empty without one.
    """

    config: Mapping[str, Any]
    images: int | None
    last: Mapping[str, Any]
    metrics: Mapping[str, float]
    baseline: Mapping[str, Any]
    results: Mapping[str, Any]
    origin: Mapping[str, Any]


def read_run(source: str | Path) -> RunRecord | None:
    """Read the record of a run; None if ``source`` is not a run folder.

    Raises:
        MapetError: if its configuration cannot be read.
    """
    folder = RunFolder(source)
    if not folder.config.is_file():
        return None
    try:
        images = read_state(folder.checkpoint).made_from.images
    except MapetError:  # the checkpoint may have been removed to save space
        images = None
    records = list(folder.metric_lines())
    return RunRecord(
        strip_paths(read_recipe(folder.config)),
        images,
        records[-1] if records else {},
        _last_metrics(records),
        _read_object(folder.baseline),
        strip_paths(_read_object(folder.results)),
        _read_object(folder.origin),
    )


def _last_metrics(records: list[dict[str, Any]]) -> dict[str, float]:
    last: dict[str, float] = {}
    for record in records:
        last |= {key: value for key, value in record.items() if key not in BOOKKEEPING and value is not None}
    for key in set(AVERAGED) & last.keys():
        values = [record[key] for record in records[-LAST_RECORDS:] if record.get(key) is not None]
        last[key] = sum(values) / len(values) if values else last[key]
    return last


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one without the file, or if it is damaged."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        logger.warning("%s is damaged (%s), so it is left out", file, error)
        return {}


def strip_paths(value: Any) -> Any:
    """Return a value with each path in it cut to its last part, and each URL without passwords and signatures."""
    if isinstance(value, Mapping):
        return {strip_paths(key): strip_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strip_paths(item) for item in value]
    if not isinstance(value, str) or value.startswith("hf-hub:"):
        return value
    if "://" in value:
        address = urlsplit(value)
        return f"{address.scheme}://{address.hostname}{address.path}"
    parts = PurePosixPath(value.replace("\\", "/")).parts
    if len(parts) > 1 and parts[-1] == "exported":  # the name of the run says more
        return parts[-2]
    return parts[-1] if parts else value


def record_origin(folder: RunFolder, model: str) -> None:
    """Keep the record of the run whose weights a run begins with: it may be gone by the time somebody asks.

    Args:
        folder: of the run that begins; a record that is there already is kept.
        model: see ``engine.runfolder.run_of``; nothing is recorded for a model that is not of a run.

    Raises:
        MapetError: if the configuration of the run cannot be read.
    """
    run = run_of(model)
    if not folder.origin.exists() and run is not None and (record := read_run(run.root)) is not None:
        origin = {"run": run.root.resolve().name, **asdict(record)}
        replace_file(folder.origin, json.dumps(origin, indent=1) + "\n")
