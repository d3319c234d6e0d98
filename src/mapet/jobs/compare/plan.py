"""The plan of a comparison: its arms, how long each is trained, and the cells of its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapet.config.base import marked, parse, settle
from mapet.config.keys import KMeansKeys
from mapet.data.open import open_images, open_labelled, train_and_test
from mapet.engine.runfolder import check_out
from mapet.errors import MapetError, nearest
from mapet.jobs.compare.arms import OF_AN_ARM, Arm, build_arms
from mapet.jobs.compare.cells import Cell, Measure, folder_name
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.evaluate.config import EVALUATIONS
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.tokenizer.config import FitConfig
from mapet.targets.tokenizer import is_ready

TRIAL_SEED = 1000  # of the trials of learning rates; no table reports it
SINGLE = marked(PretrainConfig, "single")


@dataclass(frozen=True)
class Plan:
    """What is compared and how; it makes the cells.

    Attributes:
        config: of the comparison.
        arms: in the order of the tables.
        steps: of each arm, by label and budget.
        measures: in the order of the tables.
        images: fingerprint of the training images.
        root: folder of the comparison.
    """

    config: CompareConfig
    arms: Sequence[Arm]
    steps: Mapping[str, Mapping[str, int]]
    measures: Sequence[Measure]
    images: str
    root: Path

    def trials(self) -> list[Cell]:
        """Return a cell for each learning rate of each arm, under the first budget, measured by the judge alone."""
        first, judge = self.config.budget[0], [each for each in self.measures if each.kind == self.config.judge]
        return [
            replace(self.cell(arm, TRIAL_SEED, self.steps[arm.label][first], lr), measures=judge)
            for arm in self.arms
            if arm.is_trained
            for lr in self.config.lrs
        ]

    def cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """Return the cells of the tables; those of the first seed come first, so that tables are complete early.

        Args:
            rates: the chosen learning rates by label; an arm without one is left out if there is a choice.
        """
        found: dict[Path, Cell] = {}
        for seed in range(self.config.seeds):
            for arm in self.arms:
                if self.config.lrs and arm.is_trained and arm.label not in rates:
                    continue
                for budget, steps in self.steps[arm.label].items():
                    cell = self.cell(arm, seed, steps, rates.get(arm.label))
                    cell = found.get(cell.root, cell)
                    found[cell.root] = replace(cell, budgets=(*cell.budgets, budget))
        return list(found.values())

    def cell(self, arm: Arm, seed: int, steps: int, lr: float | None = None) -> Cell:
        """Return a cell; its folder is named by all that decides the outcome."""
        values = {key: value for key, value in arm.values.items() if key != "epochs"} | {"seed": seed, "steps": steps}
        if arm.is_trained:
            values["lr"] = lr or arm.config.lr
        name = "-".join(part for part in (arm.name, Path(arm.tokenizer).name, f"seed{seed}") if part)
        root = self.root / "cells" / folder_name(name, arm.decisive(values), self.images)
        fit = None
        if arm.tokenizer and not is_ready(arm.tokenizer):
            fit = _fit_values(arm, seed)
            folder = folder_name(Path(arm.tokenizer).name, arm.decisive(fit), self.images)
            values = {key: value for key, value in values.items() if key not in KMeansKeys.model_fields}
            values["tokenizer"] = str(self.root / "tokenizers" / folder)
        return Cell(arm, seed, values, fit, root, self.measures, self.config.data)


def _fit_values(arm: Arm, seed: int) -> dict[str, Any]:
    """Return the configuration of the tokenizer that all arms of a seed share; see ``FitConfig``."""
    shared = FitConfig.model_fields.keys() & PretrainConfig.model_fields.keys() - {"batch_size"}
    crop_min = None if arm.config.crop_min == 1 else arm.config.crop_min
    own = {"teacher": arm.tokenizer, "seed": seed, "crop_min": crop_min}
    return arm.config.model_dump(mode="json", include=shared) | own


def make_plan(asked: Mapping[str, Any], root: Path) -> Plan:
    """Settle a comparison; nothing is trained or written.

    Args:
        asked: values by key: those of ``CompareConfig``, and those of ``PretrainConfig`` that all arms share.
        root: folder of the comparison.

    Raises:
        MapetError: for what cannot work.
    """
    # A recipe of pre-training that is the base of a comparison may have keys that are set for each run.
    known = {*CompareConfig.model_fields, *PretrainConfig.model_fields} - (SINGLE - OF_AN_ARM - {"seed"})
    for key in asked.keys() - known:
        raise MapetError(f"a comparison has no key {key!r}{nearest(str(key), known) or '; leave it out'}")
    own = {key: value for key, value in asked.items() if key in CompareConfig.model_fields}
    config = settle(CompareConfig, own, "the comparison")
    check_out(config.data, root)
    shared = {key: value for key, value in asked.items() if key not in SINGLE and key not in own}
    if config.lrs and shared.get("lr") is not None:
        raise MapetError("lr and lrs are both given; leave lr out to choose among lrs, or lrs to set it")
    _, test = open_labelled(config.data)
    folder = Path(config.data)
    parts = train_and_test(folder) if folder.is_dir() else None
    images = open_images(str(parts[0]) if parts else config.data)
    arms = list(build_arms(config, {**shared, "data": images.name}, len(images)))
    first = next((arm for arm in arms if arm.is_trained), None)
    if first is None:
        raise MapetError("no arm is trained, so there is nothing to compare; name an objective")
    steps: dict[str, dict[str, int]] = {}
    for arm in arms:
        if arm.label in steps:
            raise MapetError(f"two arms are called {arm.label!r}, tokenizer included; name one differently")
        steps[arm.label] = {budget: arm.count_steps(budget, first, len(images)) for budget in config.budget}
    measures = [_check_measure(kind, config, test.fingerprint) for kind in config.measures]
    return Plan(config, arms, steps, measures, images.fingerprint, root)


def _check_measure(kind: str, config: CompareConfig, test_images: str) -> Measure:
    given, origin = getattr(config, kind), f"{kind} of the comparison"
    for key in {"data", "model", "reinit"} & given.keys():
        raise MapetError(f"{origin} has {key!r}, which the comparison sets for each run; leave it out")
    config_class = FinetuneConfig if kind == "finetune" else EVALUATIONS[kind][0]
    keys = parse(config_class, given, origin)
    decisive = {key: value for key, value in keys.items() if key not in marked(config_class, "free")}
    return Measure(kind, keys, folder_name(kind, decisive, test_images))
