"""A cell of a comparison: one pre-training and its measures, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mapet.config.base import StrictConfig, free_keys, make_config
from mapet.data.workers import when_parent_ends
from mapet.engine.files import replace_file, replace_folder
from mapet.engine.runfolder import RunFolder, held_folder
from mapet.errors import MapetError
from mapet.jobs.compare.costs import step_seconds
from mapet.jobs.compare.report import COSTS
from mapet.jobs.evaluate.run import Memo, evaluate
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.jobs.finetune.run import finetune
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.pretrain.run import initial_backbone, pretrain
from mapet.jobs.tokenizer.fit import fit_tokenizer
from mapet.models.export import export_network

logger = logging.getLogger(__name__)

UNTRAINED = "random"  # in place of an objective: the network as it begins
PATIENCE_S = 600  # for the process of a comparison that was killed, to save and end
Record = dict[str, Any]
# A comparison has seeds of its own.
REPEATED = {"linear": {"seeds": 1}, "attentive": {"seeds": 1}}


@dataclass(frozen=True)
class Cell:
    """One pre-training and its measures.

    Attributes:
        name: of what is compared: arm and tokenizer.
        arm: its name alone.
        tokenizer: its name; "" where the objective needs none.
        seed: of everything random.
        values: of pre-training, by key, see ``PretrainConfig``; for the untrained network those of its backbone.
        fit: how the tokenizer at ``values["tokenizer"]`` is fitted, see ``FitConfig``; None if it need not be.
        flops: of one image, forward and backward.
        root: the folder of the cell.
        budgets: the names of those whose tables it is in; () if it is a trial of a learning rate.
        measures: what is measured, and how: the keys of ``mapet eval KIND`` and ``mapet finetune``.
        data: labelled, for the measures.
        test_images: fingerprint of those that are measured on.
    """

    name: str
    arm: str
    tokenizer: str
    seed: int
    values: Mapping[str, Any]
    fit: Mapping[str, Any] | None
    flops: float
    root: Path
    budgets: tuple[str, ...] = ()
    measures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: str = ""
    test_images: str = ""

    @property
    def title(self) -> str:
        """The cell in words."""
        if not self.budgets:
            return f"{self.name}, learning rate {self.values['lr']:g} on trial"
        return f"{self.name}, seed {self.seed}, equal {' and '.join(self.budgets)}"

    @property
    def is_done(self) -> bool:
        """Whether it is trained and measured in every way asked for."""
        record = read_record(self.root)
        return "cost" in record and all(self.has_taken(kind, record) for kind in self.measures)

    def has_taken(self, kind: str, record: Record) -> bool:
        """Whether a measure has been taken, in the way and on the images that are asked for."""
        asked, found = self._asked(kind), record.get(kind, {})
        return {key: found.get(key) for key in asked} == asked and (kind == "finetune" or "held_out" in found)

    def taken(self, kind: str, found: Mapping[str, Any]) -> Record:
        """Return what is written down of a measure: of test images, and of the best setting on those held out."""
        held_out = {"held_out": max(tried["held_out"] for tried in found["sweep"])} if "sweep" in found else {}
        return {**self._asked(kind), "accuracy": found["accuracy"], **held_out}

    def _asked(self, kind: str) -> Record:
        return {"keys": dict(self.measures[kind]), "images": self.test_images}


def folder_name(name: str, values: Mapping[str, Any], fingerprint: str) -> str:
    """Return the name of the folder of a cell or a tokenizer.

    It follows from all that decides the content, so with other settings or other images it is another.
    """
    digest = hashlib.sha256(json.dumps([values, fingerprint], sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', name)[:80]}-{digest}"


def read_record(root: Path) -> Record:
    """Return what is known of the cell in a folder: its ``cost``, its measures by kind, or why it ``failed``."""
    try:
        record = json.loads((root / "cell.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        record = None
    if not _is_record(record):
        raise MapetError(f"{root / 'cell.json'} is damaged; remove the file, and the cell is finished anew")
    return dict(record)


def _is_record(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    measures = [value for key, value in content.items() if key not in ("cost", "failed")]
    costs = content.get("cost", dict.fromkeys(COSTS, 0))
    return (
        isinstance(costs, dict)
        and all(isinstance(costs.get(key), int | float) for key in COSTS)
        and all(isinstance(value, dict) and isinstance(value.get("accuracy"), int | float) for value in measures)
        and all(isinstance(value.get("held_out", 0.0), int | float) for value in measures)
    )


def run_cell(cell: Cell) -> str | None:
    """Finish a cell in a process of its own, so that what kills it kills nothing else, and memory is its own.

    Returns:
        why it failed, or None.

    Raises:
        KeyboardInterrupt: if it was stopped by a signal, and saved.
    """
    cell.root.mkdir(parents=True, exist_ok=True)
    if "failed" in (record := read_record(cell.root)):
        del record["failed"]  # it was another time
        _write(cell, record)
    failure = None
    if cell.fit is not None and not Path(cell.values["tokenizer"]).exists():
        failure = _isolated(_fit, cell)
    failure = failure or _isolated(_finish, cell)
    if failure is not None:
        _write(cell, {**read_record(cell.root), "failed": failure})
    return failure


def _isolated(work: Callable[[Cell, Record], int | None], cell: Cell) -> str | None:
    spawned = multiprocessing.get_context("spawn")
    failure, its_end = spawned.Pipe(duplex=False)
    process = spawned.Process(target=_in_process, args=(work, cell, its_end), name=cell.title)
    process.start()
    try:
        wait([failure, process.sentinel])  # it cannot end before a reason that the pipe does not hold is received
        why_failed = failure.recv() if failure.poll() else None
        process.join()
    except BaseException:
        process.terminate()  # saves what it has
        process.join()
        raise
    if why_failed is not None:
        return str(why_failed)
    code = process.exitcode or 0
    if code < 0:
        why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{why}"
    if code > 128:
        raise KeyboardInterrupt
    return f"its process ended with status {code}; what it printed says why" if code else None


def _in_process(work: Callable[[Cell, Record], int | None], cell: Cell, failure: Connection) -> None:
    """Do a cell's work in this process, send why it failed if it did, and end the process."""
    # Ctrl-C reaches all processes of a terminal; the comparison passes on what is meant for this one.
    if hasattr(os, "setsid"):
        os.setsid()
    when_parent_ends(partial(os.kill, os.getpid(), signal.SIGTERM))  # nobody waits for this any more
    try:
        with held_folder(cell.root, patience_s=PATIENCE_S):
            stopped_by = work(cell, read_record(cell.root))
    except Exception as error:
        if not isinstance(error, MapetError):
            logger.exception("cell %s failed", cell.title)
        failure.send(str(error) or type(error).__name__)
        sys.exit(1)
    sys.exit(128 + stopped_by if stopped_by else 0)


def _fit(cell: Cell, record: Record) -> None:
    """Fit the tokenizer that the cells of a seed have in common."""
    assert cell.fit is not None
    tokenizer = Path(cell.values["tokenizer"])
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    with held_folder(tokenizer.parent, f".{tokenizer.name}.fit", patience_s=-1):
        if not tokenizer.exists():  # another process may have made it while this one waited
            fit_tokenizer(cell.fit, tokenizer)


def _finish(cell: Cell, record: Record) -> int | None:
    """Do what is left to do; return the signal that ended it early, or None."""
    console = Console(stderr=True)
    run = RunFolder(cell.root / "run")
    if "cost" not in record:
        if cell.values["objective"] == UNTRAINED:
            _export_untrained(cell, run)
            record["cost"] = {"steps": 0, "flops": 0.0, "seconds": 0.0, "memory": 0}
        else:
            # What has begun knows its tokenizer, by a path that may have been another.
            values = _free(PretrainConfig, cell.values) if run.config.exists() else cell.values
            result = pretrain(values, run.root, resume=True, console=console)
            if result.steps < result.total_steps:
                return result.stopped_by
            batch = result.config.batch_size
            record["cost"] = {
                "steps": result.steps,
                "flops": cell.flops * result.steps * batch,
                "seconds": step_seconds(run) * result.steps,
                "memory": _peak_memory(),
            }
        _write(cell, record)
    memo: Memo = {}
    for kind, keys in cell.measures.items():
        if cell.has_taken(kind, record):
            continue
        given = {"model": str(run.exported), "data": cell.data, "seed": cell.seed, **REPEATED.get(kind, {}), **keys}
        if kind == "finetune":
            out = cell.root / folder_name("finetuned", keys, cell.test_images)
            values = _free(FinetuneConfig, given) if RunFolder(out).config.exists() else given
            tuned = finetune(values, out, resume=True, console=console)
            if tuned.scores is None:
                return tuned.stopped_by
            found = {"accuracy": tuned.scores.accuracy}
        else:
            found = evaluate(kind, given, console=console, memo=memo)
        record[kind] = cell.taken(kind, found)
        _write(cell, record)
    return None


def _export_untrained(cell: Cell, run: RunFolder) -> None:
    """Export the network that the other arms begin with."""
    config = make_config(PretrainConfig, {key: value for key, value in cell.values.items() if key != "objective"})
    export = partial(export_network, initial_backbone(config), mean=config.input_mean, std=config.input_std)
    run.root.mkdir(parents=True, exist_ok=True)
    replace_folder(run.exported, export)


def _free(config_class: type[StrictConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may change when a run goes on, such as the place of the images."""
    return {key: values[key] for key in free_keys(config_class) & values.keys()}


def _write(cell: Cell, record: Record) -> None:
    replace_file(cell.root / "cell.json", json.dumps(record, indent=1) + "\n")


def _peak_memory() -> int:
    """Return the most bytes that this process has held: on the GPU if it has one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
