"""A cell of a comparison: one pre-training and its measures, made by other commands of ``mapet``, each a process.

The state of a cell is what these commands write: a run folder, with a folder for each measure in it. ``failure.txt``
holds the reason if the last attempt failed.
"""

import hashlib
import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mapet.config.base import Config, marked
from mapet.data.open import open_images
from mapet.engine.files import held_folder, replace_file, replace_folder
from mapet.engine.measuring import with_measured
from mapet.engine.runfolder import RunFolder
from mapet.errors import MapetError
from mapet.jobs.compare.arms import UNTRAINED, Arm
from mapet.jobs.compare.table import read_results
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.jobs.pretrain.config import PretrainConfig, input_of
from mapet.jobs.pretrain.settle import initial_backbone
from mapet.models.export import export_network

logger = logging.getLogger(__name__)

# A comparison has seeds of its own.
REPEATED = {"linear": {"seeds": 1}, "attentive": {"seeds": 1}}
POLL_S = 5.0  # between looks at the cells that other processes work on


@dataclass(frozen=True)
class Measure:
    """One way to measure a network.

    Attributes:
        kind: knn, linear, attentive or finetune.
        keys: of ``mapet eval KIND`` or ``mapet finetune``.
        folder: name of the folder of its results; follows from the keys and the test images.
    """

    kind: str
    keys: Mapping[str, Any]
    folder: str


@dataclass(frozen=True)
class Cell:
    """One pre-training and its measures.

    Attributes:
        arm: what is trained.
        seed: of everything random.
        values: of pre-training, by key; see ``PretrainConfig``.
        fit: values for ``mapet tokenizer fit``, which makes ``values["tokenizer"]``; None if nothing is fitted.
        root: the folder of the cell.
        measures: how the network is measured.
        data: labelled images for the measures.
        budgets: those that the cell belongs to; none for the trial of a learning rate.
    """

    arm: Arm
    seed: int
    values: Mapping[str, Any]
    fit: Mapping[str, Any] | None
    root: Path
    measures: Sequence[Measure]
    data: str
    budgets: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name of the cell in messages."""
        if not self.budgets:
            return f"{self.arm.label}, trial of learning rate {self.values['lr']:g}"
        return f"{self.arm.label}, seed {self.seed}, equal {' and '.join(self.budgets)}"

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.root / "run")

    @property
    def failure(self) -> str | None:
        """Reason if the last attempt failed; None if it did not."""
        file = self.root / "failure.txt"
        return file.read_text() if file.exists() else None

    def results(self) -> dict[str, dict[str, Any]]:
        """Return the results of the measures that are taken, by kind."""
        found = {measure.kind: read_results(self.run.root / measure.folder) for measure in self.measures}
        return {kind: results for kind, results in found.items() if results is not None}

    @property
    def is_done(self) -> bool:
        """Whether all measures are taken."""
        return len(self.results()) == len(self.measures)

    def finish(self) -> None:
        """Do what is left to do.

        Raises:
            MapetError: with the reason, if one of the processes fails.
        """
        if self.fit is not None:
            tokenizer = Path(self.values["tokenizer"])
            tokenizer.parent.mkdir(parents=True, exist_ok=True)
            # Other processes may work on other arms of this seed.
            with held_folder(tokenizer.parent, f".{tokenizer.name}.fit", patience_s=-1):
                _make(("tokenizer", "fit"), self.fit, tokenizer)
        if not self.arm.is_trained:
            config = self.arm.config.but(seed=self.seed)
            config = with_measured(config, open_images(config.data))
            network, about = initial_backbone(config), input_of(config)
            replace_folder(self.run.exported, lambda folder: export_network(network, folder, **about))
            self.run.write_config(config.but(objective=UNTRAINED))
        # A finished run may have lost its checkpoint since; its measures show that it is finished.
        elif not any(self.run.root.glob("*/results.json")):
            _train("pretrain", PretrainConfig, self.values, self.run.root)
        for measure in self.measures:
            kind, out = measure.kind, self.run.root / measure.folder
            place = {"model": str(self.run.exported), "data": self.data, "seed": self.seed}
            values = {**place, **REPEATED.get(kind, {}), **measure.keys}
            if kind != "finetune":
                _make(("eval", kind), values, out)
            elif not (out / "results.json").exists():
                _train("finetune", FinetuneConfig, values, out)


def folder_name(name: str, *content: Any) -> str:
    """Return a folder's name: a readable one, and a hash of all that decides the content of the folder."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.=+-]+', '_', name)[:80]}-{digest}"


def _make(words: Sequence[str], values: Mapping[str, Any], out: Path) -> None:
    """Run a command that makes a folder, unless the folder is there."""
    with held_folder(out.parent, f".{out.name}.lock", patience_s=-1):
        pass  # the process of a comparison that was killed may still be at it
    if not out.exists():
        _run_mapet(words, values, out)


def _train(verb: str, config_class: type[Config], values: Mapping[str, Any], out: Path) -> None:
    """Begin or continue a run."""
    out.mkdir(parents=True, exist_ok=True)
    with held_folder(out, patience_s=-1):
        pass  # as in _make
    # A run that was begun knows its tokenizer and model, by paths that may have been others.
    wanted = marked(config_class, "free") if RunFolder(out).config.exists() else values.keys()
    _run_mapet((verb, "--resume"), {key: values[key] for key in values if key in wanted}, out)


def _run_mapet(words: Sequence[str], values: Mapping[str, Any], out: Path) -> None:
    """Run a command in a process of its own, so that what kills it kills nothing else, and show what it says.

    If this process is stopped, it stops the command, which saves.

    Args:
        words: of the command.
        values: of its configuration; kept in a recipe beside ``out``.
        out: its ``--out``.

    Raises:
        MapetError: with the reason, if the command fails.
        KeyboardInterrupt: if the command was stopped by a signal and saved.
    """
    recipe = out.with_name(f"{out.name}.yaml")
    replace_file(recipe, yaml.safe_dump(dict(values), sort_keys=False))
    process = subprocess.Popen(
        [sys.executable, "-m", "mapet", *words, "--config", str(recipe), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C reaches the comparison alone, which passes it on
    )
    said = ""
    try:
        for line in process.stderr or ():
            sys.stderr.write(line)
            said = line.strip() or said
        status = process.wait()
    except BaseException:
        process.terminate()
        process.communicate()
        raise
    if status > 128:
        raise KeyboardInterrupt
    if status < 0:
        raise MapetError(f"its process was ended by {signal.Signals(-status).name}; perhaps memory ran out")
    if status:
        raise MapetError(said.removeprefix("mapet: error: ") or f"its process ended with status {status}")


def finish_cells(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Finish the cells one by one, beside other processes that do the same; yield each cell worked on.

    A cell that another process works on is left to it. When nothing else is left, it is waited for, and finished here
    if that process was killed. A cell that fails is named, and the others go on.
    """
    left, is_first_round = list(enumerate(cells, 1)), True
    while left:
        others = []
        for number, cell in left:
            # A failure before the first round is from another time; later ones are from other processes.
            if cell.is_done or (cell.failure is not None and not is_first_round):
                continue
            cell.root.mkdir(parents=True, exist_ok=True)
            try:
                with held_folder(cell.root):
                    logger.info("cell %d of %d: %s", number, len(cells), cell.title)
                    _try_to_finish(cell)
            except MapetError:  # another process holds it
                others.append((number, cell))
                continue
            yield cell
        if others:
            time.sleep(POLL_S)
        left, is_first_round = others, False


def _try_to_finish(cell: Cell) -> None:
    file = cell.root / "failure.txt"
    file.unlink(missing_ok=True)
    try:
        cell.finish()
    except MapetError as error:
        logger.warning("cell %s failed: %s; the others go on", cell.title, error)
        replace_file(file, str(error))
