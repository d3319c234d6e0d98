"""Tables of runs. A run is a mapping of figures by name; a row stands for one run, or for the seeds of one setting."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapet.config.base import marked
from mapet.engine.lineage import read_run
from mapet.errors import MapetError
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.report.tables import Table

Figures = Mapping[str, Any]

# Measures of a network, and their headers.
MEASURES = {
    "knn": "k-NN (%)",
    "linear": "linear probe (%)",
    "attentive": "attentive probe (%)",
    "finetune": "fine-tuned (%)",
    "segment": "segmentation, pixels (%)",
    "accuracy": "accuracy (%)",
}
# Header, factor and format of other figures; what is not among them is written as it is.
COLUMNS = {name: (header, 100.0, ".1f") for name, header in MEASURES.items()} | {
    "lr": ("learning rate", 1.0, "g"),
    "flops": ("TFLOPs", 1e-12, ".3g"),
    "seconds": ("seconds", 1.0, ".0f"),
    "steps": ("steps", 1.0, ".0f"),
    "epochs": ("epochs", 1.0, ".4g"),
    "loss": ("loss", 1.0, ".4f"),
    "baseline": ("baseline", 1.0, ".4f"),
}


def read_results(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``results.json``; None without it.

    Raises:
        MapetError: if it is damaged.
    """
    file = folder / "results.json"
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text()))
    except (TypeError, ValueError, RecursionError) as error:
        raise MapetError(f"{file} is damaged ({error}); remove its folder or restore it") from None


def tabulate(title: str, groups: Mapping[str, Sequence[Figures]], names: Sequence[str], wanted: int = 1) -> Table:
    """Return a table with a row for each group of runs: means, and for measures also standard deviations.

    Args:
        title: of the table.
        groups: runs by the name of a row.
        names: figures that become columns.
        wanted: runs of a complete group; a measure that fewer runs have says so.
    """
    header = ["", *(COLUMNS[name][0] if name in COLUMNS else name for name in names)]
    rows = [[row, *(_write(name, runs, wanted) for name in names)] for row, runs in groups.items()]
    return Table(header, rows, title)


def _write(name: str, runs: Sequence[Figures], wanted: int) -> str:
    values = [run[name] for run in runs if run.get(name) is not None]
    if not values or name not in COLUMNS:
        return ", ".join(dict.fromkeys(map(str, values))) or "-"
    _, factor, form = COLUMNS[name]
    text = format(factor * statistics.mean(values), form)
    if name not in MEASURES:
        return text
    if len(values) > 1:
        text += f" +- {factor * statistics.stdev(values):{form}}"
    return text if len(values) == wanted else f"{text} ({len(values)} of {wanted})"


def tabulate_runs(folders: Sequence[str]) -> Table:
    """Return a table of run folders: what they trained, how long, with what result, and in which keys they differ.

    Raises:
        MapetError: for a folder that holds no run.
    """
    runs = {folder: _read_figures(folder) for folder in folders}
    config_keys = dict.fromkeys(key for figures, config in runs.values() for key in config if key not in figures)
    names = list(dict.fromkeys(name for figures, _ in runs.values() for name in figures))
    names += [key for key in config_keys if len({str(config.get(key)) for _, config in runs.values()}) > 1]
    return tabulate("", {folder: [{**config, **figures}] for folder, (figures, config) in runs.items()}, names)


def _read_figures(folder: str) -> tuple[Figures, Figures]:
    """Return the figures of a run, and its configuration without keys that do not touch what is computed.

    Accuracies are those of ``results.json`` in the run folder, and of evaluations whose ``--out`` is in it.
    """
    run = read_run(folder)
    if run is None:
        raise MapetError(f"{folder!r} holds no run; name run folders, such as runs/photos")
    figures = {key: run.config.get(key) for key in ("objective", "targets", "tokenizer")}
    last, baseline = run.last, run.baseline
    figures |= {"steps": last.get("step", -1) + 1, "epochs": last.get("epoch"), "images": last.get("images")}
    figures |= {"loss": run.metrics.get("loss"), "baseline": baseline.get("entropy") or baseline.get("level")}
    figures |= {key: value for key, value in run.results.items() if key in MEASURES}
    for place in sorted(Path(folder).iterdir()):
        results = read_results(place) or {}
        if "accuracy" in results:
            figures[results.get("kind", "finetune")] = results["accuracy"]
    free = marked(PretrainConfig, "free")
    return figures, {key: value for key, value in run.config.items() if key not in free}
