"""A comparison of pre-trainings: a grid of cells that differ in what is compared and in nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mapet.config.base import free_keys, make_config, override, read_recipe
from mapet.data.labelled import train_and_test
from mapet.engine.files import replace_file
from mapet.engine.runfolder import RunFolder, explain_disk_errors, held_folder
from mapet.engine.training import check_out
from mapet.errors import MapetError, nearest
from mapet.jobs.compare.cells import Cell, read_record
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.compare.grid import finish_cells
from mapet.jobs.compare.plan import Plan, make_plan
from mapet.jobs.compare.report import Comparison, Rates, Row, write_comparison
from mapet.jobs.pretrain.config import PretrainConfig

# Keys of pre-training that make no sense for several.
NOT_SHARED = ("tokens", "init", "init_parts", "eval_data", "eval_every")


def compare(values: Mapping[str, Any], out: str | Path, *, resume: bool = False) -> Comparison:
    """Pre-train with several objectives and tokenizers in one setting, and measure what each is worth.

    Every cell is a run folder below ``out/cells``; a comparison that was killed continues where it was, and one that
    is asked for more (seeds, arms, measures) does only what is new. Call it below ``if __name__ == "__main__"``: each
    cell works in a process of its own.

    Args:
        values: configuration by key: those of ``CompareConfig``, and those of ``PretrainConfig`` for all cells alike.
        out: the folder of the comparison.
        resume: continue or extend the comparison in ``out``, or begin it if there is none.

    Raises:
        MapetError: for input that cannot work, before anything is trained. A cell that fails later is in the result.
    """
    if not str(out):
        raise MapetError("the name of the output folder is empty; say where with --out FOLDER")
    root = Path(out)
    with explain_disk_errors(root), _held(root):
        asked = _settle(values, root, resume)
        plan = _plan(asked, root)
        replace_file(root / "compare.yaml", yaml.safe_dump(asked, sort_keys=False))
        return _run(plan)


def join_comparison(values: Mapping[str, Any], out: str | Path) -> Comparison:
    """Work on the comparison in ``out`` beside the process that began it, on this machine or on another.

    Cells that no process works on are finished here. It ends when there are none left, with the same tables.

    Args:
        values: what may differ here, by key: the place of the images, ``workers``, ``log_every``, ...
        out: the folder of the comparison.

    Raises:
        MapetError: if there is no comparison, or a value would make it another.
    """
    root = Path(out)
    saved = root / "compare.yaml"
    if not saved.is_file():
        raise MapetError(f"folder {str(out)!r} holds no comparison to join; begin it first, without --join")
    for key in values:
        if key not in free_keys(PretrainConfig):
            raise MapetError(f"a comparison is joined as it is, but {key!r} would make it another; leave that out")
    with explain_disk_errors(root):
        plan = _plan({**read_recipe(saved), **values}, root)
        if "data" in values and not any(cell.root.exists() for cell in (*plan.trials(), *plan.cells({}))):
            raise MapetError(
                f"no cell of the comparison in {root} has the images of {str(values['data'])!r}: their number or names "
                "differ; name a copy of those that it began with"
            )
        return _run(plan)


def _plan(asked: Mapping[str, Any], root: Path) -> Plan:
    config = make_config(CompareConfig, {key: asked[key] for key in CompareConfig.model_fields if key in asked})
    check_out(config.data, root)
    return make_plan(config, _shared(asked, config), root)


@contextmanager
def _held(root: Path) -> Iterator[None]:
    """Hold the folder for this process."""
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with held_folder(root):
            yield
    finally:
        if is_new and not (root / "compare.yaml").exists():  # refused
            shutil.rmtree(root)


def _settle(values: Mapping[str, Any], root: Path, resume: bool) -> dict[str, Any]:
    """Return the values; on resume they complete those the comparison began with."""
    saved = root / "compare.yaml"
    if not saved.exists():
        if others := sorted(path.name for path in root.iterdir() if path.name not in (".lock", "times.json")):
            raise MapetError(f"output folder {root} holds {others[0]!r}, but no comparison; choose another --out")
        return dict(values)
    if not resume:
        raise MapetError(
            f"output folder {root} holds a comparison; pass --resume to continue or extend it, or another --out"
        )
    return override(read_recipe(saved), dict(values))


def _shared(values: Mapping[str, Any], config: CompareConfig) -> dict[str, Any]:
    """Return the values of pre-training that all cells have in common."""
    shared = {key: value for key, value in values.items() if key not in CompareConfig.model_fields}
    for key in NOT_SHARED:
        if shared.get(key) is not None:
            raise MapetError(f"{key!r} is for mapet pretrain; a comparison has no use for it, leave it out")
    for key in shared:
        if key not in PretrainConfig.model_fields:
            known = {*CompareConfig.model_fields, *PretrainConfig.model_fields} - set(NOT_SHARED)
            raise MapetError(f"the comparison has the unknown key {key!r}{nearest(str(key), known) or '; see --help'}")
    if config.lrs and shared.get("lr") is not None:
        raise MapetError("lr and lrs are both given; leave lr out to choose among lrs, or lrs to set it")
    # A recipe of pre-training names one objective, one tokenizer and one seed.
    for key in ("objective", "tokenizer", "seed"):
        shared.pop(key, None)
    folder = Path(config.data)
    parts = train_and_test(folder) if folder.is_dir() else None
    return {**shared, "data": str(parts[0]) if parts else config.data}


def _run(plan: Plan) -> Comparison:
    """Try the learning rates, take the best, and finish the cells of the tables; written anew after each."""
    trials = plan.trials()
    known: dict[Path, Row] = {}
    report = partial(_report, plan, trials, known)
    for _ in finish_cells(trials):
        report()
    for _ in finish_cells(plan.cells(_best(_rates(trials)))):
        report()
    return report()


def _failures(cells: Iterable[Cell]) -> dict[str, str]:
    """Return why cells failed, by their titles."""
    records = [(cell, read_record(cell.root)) for cell in cells if not cell.is_done]
    return {cell.title: record["failed"] for cell, record in records if "failed" in record}


def _rates(trials: Sequence[Cell]) -> dict[str, Rates]:
    """Return what was found of learning rates, by the names of variants that have tried them all."""
    failures = _failures(trials)
    pending = {cell.name for cell in trials if not cell.is_done and cell.title not in failures}
    found: dict[str, dict[float, float]] = {}
    for cell in trials:
        if cell.is_done and cell.name not in pending:
            (judge,) = cell.measures
            found.setdefault(cell.name, {})[cell.values["lr"]] = read_record(cell.root)[judge]["held_out"]
    return {name: Rates(held_out) for name, held_out in found.items()}


def _best(rates: Mapping[str, Rates]) -> dict[str, float]:
    return {name: tried.best for name, tried in rates.items()}


def _report(plan: Plan, trials: Sequence[Cell], known: dict[Path, Row]) -> Comparison:
    """Write the tables and pictures of what is finished so far; ``known`` keeps what needs no reading again."""
    rates, rows = _rates(trials), []
    cells = plan.cells(_best(rates))
    for cell in cells:
        row = known.get(cell.root) or _row(cell)
        if row is not None:
            rows.append(row)
            if cell.is_done:
                known[cell.root] = row
    asked = plan.config
    comparison = Comparison(
        asked.data,
        asked.measures,
        asked.seeds,
        asked.budget,
        tuple(variant.name for variant in plan.compared),
        tuple(rows),
        _failures([*trials, *cells]),
        asked.lrs,
        rates,
        asked.judge,
    )
    with held_folder(plan.root, ".report", patience_s=-1):  # other processes write it too
        write_comparison(comparison, plan.root)
    return comparison


def _row(cell: Cell) -> Row | None:
    """Return what is known of a cell; None if it is not yet trained."""
    record = read_record(cell.root)
    if "cost" not in record:
        return None
    run = RunFolder(cell.root / "run")
    measured = {kind: record[kind]["accuracy"] for kind in cell.measures if cell.has_taken(kind, record)}
    curve = [(line["epoch"], line["loss"]) for line in run.metric_lines()]
    lr = read_recipe(run.config).get("lr") if curve else None
    return Row(cell.name, cell.arm, cell.tokenizer, cell.seed, lr, cell.budgets, record["cost"], measured, curve)
