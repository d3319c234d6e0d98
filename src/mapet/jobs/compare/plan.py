"""The plan of a comparison: its cells, and how long each is trained."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapet.config.base import free_keys, make_config
from mapet.config.keys import KMeansKeys
from mapet.data.labelled import open_labelled
from mapet.data.open import open_images
from mapet.data.sources import ImageSet
from mapet.engine.files import replace_file
from mapet.errors import MapetError, nearest
from mapet.jobs.compare.cells import UNTRAINED, Cell, folder_name
from mapet.jobs.compare.config import CompareConfig
from mapet.jobs.compare.costs import FREE, Cost, hash_teacher, measure_cost, time_step
from mapet.jobs.evaluate.config import EVALUATIONS
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.tokenizer.config import FitConfig
from mapet.objectives.registry import OBJECTIVES
from mapet.targets.tokenizer import is_ready

logger = logging.getLogger(__name__)

# What must be the same for all arms, or is said otherwise.
NOT_OF_AN_ARM = ("data", "epochs", "eval_data", "init", "seed", "steps", "tokens")
# What every measure is given by the cell that it measures.
NOT_OF_A_MEASURE = ("data", "model", "reinit")
# Of what learning rates are chosen by: none that a comparison reports.
TRIAL_SEED = 1000


@dataclass(frozen=True)
class Variant:
    """What is compared: an arm with a tokenizer.

    Attributes:
        arm: its name.
        tokenizer: what ``--tokenizer`` takes; "" where the objective needs none.
        values: of pre-training, but for the seed, the tokenizer, and the length that a budget gives.
        cost: of an optimiser step.
    """

    arm: str
    tokenizer: str
    values: Mapping[str, Any]
    cost: Cost

    @property
    def name(self) -> str:
        """The two in words."""
        return f"{self.arm}, {self.tokenizer}" if self.tokenizer else self.arm

    @property
    def is_trained(self) -> bool:
        """Whether it is more than the network as it begins."""
        return bool(self.values["objective"] != UNTRAINED)

    def known_by_content(self, key: str) -> dict[str, str | None]:
        """Return what stands for the name of a tokenizer or teacher, and of its weights, in what decides a cell."""
        return {key: self.cost.tokenizer_hash, "teacher_weights": None} if self.cost.tokenizer_hash else {}

    def steps(self, images: int, **length: int | None) -> int:
        """Return the optimiser steps of a run over so many images, as long as its recipe says or as is said here."""
        return _config(self.arm, self.tokenizer, {**self.values, **length}).resolve(images).total_steps(images)


def variants(config: CompareConfig, shared: Mapping[str, Any], images: int) -> Iterator[Variant]:
    """Yield each arm with each of its tokenizers.

    Args:
        config: of the comparison.
        shared: values of pre-training that all arms have in common.
        images: how many there are to train on.

    Raises:
        MapetError: naming an arm that cannot work.
    """
    teacher_hash = functools.cache(hash_teacher)  # large teachers take long to load
    known = (*OBJECTIVES, UNTRAINED)
    for arm, differing in config.differing.items():
        is_own = "objective" not in differing and arm in known  # what that objective has of its own
        if is_own and config.objectives and arm not in config.objectives:
            logger.info("objective %r is not named in objectives: what arms say of it is not used", arm)
            continue
        for key in NOT_OF_AN_ARM:
            if key in differing:
                raise MapetError(f"arm {arm!r} has its own {key!r}, which must be the same for all; leave it out")
        if config.lrs and "lr" in differing:
            raise MapetError(f"arm {arm!r} has its own 'lr', but lrs are tried by all arms alike; leave one out")
        values = {**shared, "objective": arm, **differing}  # the name may say it all
        without_ids = {key: value for key, value in values.items() if key not in KMeansKeys.model_fields}
        _config(arm, values.get("tokenizer"), without_ids)
        own = values.pop("tokenizer", None)
        without_ids.pop("tokenizer", None)
        objective = values["objective"]
        if own and (objective == UNTRAINED or (objective in OBJECTIVES and not OBJECTIVES[objective].needs_ids)):
            raise MapetError(f"arm {arm!r} names a tokenizer, but objective {objective!r} needs none; leave it out")
        if objective == UNTRAINED:
            yield Variant(arm, "", _checked(arm, "", without_ids), FREE)
            continue
        if objective not in OBJECTIVES:
            hint = nearest(objective, known) or f"; choose from {sorted(known)}"
            raise MapetError(f"arm {arm!r} has the unknown objective {objective!r}{hint}")
        if not OBJECTIVES[objective].needs_ids:
            tokenizers: Sequence[str] = ("",)
            values = without_ids
        else:
            tokenizers = (own,) if own else config.tokenizers
        for tokenizer in tokenizers:
            resolved = _config(arm, tokenizer, values).resolve(images)
            try:
                cost = measure_cost(resolved, tokenizer, images, teacher_hash)
            except MapetError as error:
                raise MapetError(f"arm {arm!r} cannot work: {error}") from error
            yield Variant(arm, tokenizer, _checked(arm, tokenizer, values), cost)


@dataclass(frozen=True)
class Plan:
    """What is compared, under which budgets, and how it is measured; it makes the cells.

    Attributes:
        config: of the comparison.
        compared: the variants, in the order of the tables.
        lengths: of each of them, the optimiser steps by the names of budgets.
        measures: the keys of each measure, as they are found again in a file.
        images: that are trained on.
        test_images: fingerprint of those that are measured on.
        root: the comparison's folder.
    """

    config: CompareConfig
    compared: Sequence[Variant]
    lengths: Sequence[Mapping[str, int]]
    measures: Mapping[str, Mapping[str, Any]]
    images: ImageSet
    test_images: str
    root: Path

    def check(self) -> None:
        """Refuse variants that a table, or their cells, could not tell apart."""
        names: set[str] = set()
        trained: dict[Path, str] = {}
        for variant, steps in zip(self.compared, self.lengths, strict=True):
            if variant.name in names:
                raise MapetError(f"two arms are called {variant.name!r}, tokenizer included; name one differently")
            names.add(variant.name)
            folder = self._cell(variant, 0, steps[self.config.budget[0]], ()).root
            if folder in trained:
                raise MapetError(f"{trained[folder]!r} and {variant.name!r} are the same training; leave one out")
            trained[folder] = variant.name

    def trials(self) -> list[Cell]:
        """Return a cell for each learning rate of each variant, as long as the first budget has it.

        They have a seed of their own, so that what is reported is not what was chosen by, and are measured by the
        probe that chooses and by nothing else.
        """
        judge, first = self.config.judge, self.config.budget[0]
        if judge is None:  # then there are no rates to choose from
            return []
        return [
            self._cell(replace(variant, values={**variant.values, "lr": lr}), TRIAL_SEED, steps[first], [judge])
            for variant, steps in zip(self.compared, self.lengths, strict=True)
            if variant.is_trained
            for lr in self.config.lrs
        ]

    def cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """Return the cells of the tables, those of the first seed first, for the tables to be complete early.

        Args:
            rates: the learning rates that were chosen, by the names of variants; without ``lrs`` none is.
        """
        found: dict[Path, Cell] = {}
        for seed in range(self.config.seeds):
            for variant, steps_by_budget in zip(self.compared, self.lengths, strict=True):
                if variant.is_trained and self.config.lrs:
                    if variant.name not in rates:
                        continue  # each of its trials failed, and is named
                    variant = replace(variant, values={**variant.values, "lr": rates[variant.name]})
                for budget, steps in steps_by_budget.items():
                    cell = self._cell(variant, seed, steps, self.config.measures)
                    budgets = (*found[cell.root].budgets, budget) if cell.root in found else (budget,)
                    found[cell.root] = replace(cell, budgets=budgets)
        return list(found.values())

    def _cell(self, variant: Variant, seed: int, steps: int, measures: Sequence[str]) -> Cell:
        values = {**variant.values, "seed": seed, "steps": steps or None, "epochs": None}
        identity = {**_decisive(values), "tokenizer": variant.tokenizer, **variant.known_by_content("tokenizer")}
        fit: Mapping[str, Any] | None = None
        if variant.tokenizer and not is_ready(variant.tokenizer):
            fit = _fit_values(variant, seed)
            values = {key: value for key, value in values.items() if key not in KMeansKeys.model_fields}
            content = {**_decisive(fit), **variant.known_by_content("teacher")}
            name = folder_name(Path(variant.tokenizer).name, content, self.images.fingerprint)
            values["tokenizer"] = str(self.root / "tokenizers" / name)
        elif variant.tokenizer:
            values["tokenizer"] = variant.tokenizer
        name = "-".join(part for part in (variant.arm, Path(variant.tokenizer).name, f"seed{seed}") if part)
        return Cell(
            variant.name,
            variant.arm,
            variant.tokenizer,
            seed,
            values,
            fit,
            variant.cost.flops,
            self.root / "cells" / folder_name(name, identity, self.images.fingerprint),
            measures={kind: self.measures[kind] for kind in measures},
            data=self.config.data,
            test_images=self.test_images,
        )


def make_plan(config: CompareConfig, shared: Mapping[str, Any], root: Path) -> Plan:
    """Build what is to be trained, and count what it costs; nothing is written but how long a step takes.

    Args:
        config: of the comparison.
        shared: values of pre-training that all cells have in common.
        root: the comparison's folder.

    Raises:
        MapetError: for what cannot work.
    """
    _, test = open_labelled(config.data)  # what cannot be measured need not be trained
    images = open_images(shared["data"])
    measures = _measures(config)
    compared = list(variants(config, shared, len(images)))
    lengths = _lengths(config, compared, len(images), root)
    plan = Plan(config, compared, lengths, measures, images, test.fingerprint, root)
    plan.check()
    return plan


def _measures(config: CompareConfig) -> dict[str, Mapping[str, Any]]:
    """Return the keys of each measure, as they are found again in a file."""
    measures: dict[str, Mapping[str, Any]] = {}
    for kind in config.measures:
        keys, origin = getattr(config, kind), f"{kind} of the comparison"
        for key in NOT_OF_A_MEASURE:
            if key in keys:
                raise MapetError(f"{origin} has {key!r}, which is that of each cell; leave it out")
        config_class = FinetuneConfig if kind == "finetune" else EVALUATIONS[kind][0]
        make_config(config_class, {"model": "-", "data": config.data, "seed": 0, **keys}, origin)
        measures[kind] = json.loads(json.dumps(keys))
    return measures


def _fit_values(variant: Variant, seed: int) -> dict[str, Any]:
    """Return how the tokenizer is fitted that all arms of a seed have in common; see ``FitConfig``."""
    keys = [key for key in FitConfig.model_fields if key in variant.values]
    given = {key: variant.values[key] for key in keys if key not in ("crop_min", "batch_size")}
    crop_min = _config(variant.arm, variant.tokenizer, variant.values).view_settings["crop_min"]
    return {
        **given,
        "teacher": variant.tokenizer,
        "seed": seed,
        "vocab_size": variant.cost.vocab_size,
        "image_size": variant.cost.image_size,
        "patch_size": variant.cost.patch_size,
        "crop_min": None if crop_min == 1 else crop_min,
    }


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that what is computed depends on; the images do by their fingerprint, wherever they lie."""
    free = free_keys(PretrainConfig)
    return {key: value for key, value in values.items() if key not in free}


def _checked(arm: str, tokenizer: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as their types have them, for one that is written in another way makes no other cell."""
    checked = _config(arm, tokenizer, values).model_dump(mode="json")
    return {key: checked[key] for key in values}


def _config(arm: str, tokenizer: str | None, values: Mapping[str, Any]) -> PretrainConfig:
    return make_config(PretrainConfig, {**values, "tokenizer": tokenizer or None}, f"arm {arm!r}")


def _lengths(config: CompareConfig, compared: Sequence[Variant], images: int, root: Path) -> list[dict[str, int]]:
    """Return the optimiser steps of each variant, by the names of budgets."""
    trained = [variant for variant in compared if variant.is_trained]
    if not trained:
        raise MapetError("no arm is trained, so there is nothing to compare; name an objective")
    first = trained[0]
    prices = {"flops": {variant.name: variant.cost.step_flops for variant in trained}}
    if any(kind == "minutes" for kind, _ in config.budgets.values()):
        prices["minutes"] = _time_steps(trained, root)

    def spend(variant: Variant, kind: str, amount: float | None) -> int:
        """Return how many steps a variant makes of an amount of what a budget counts."""
        if not variant.is_trained:
            return 0
        if kind in ("epochs", "steps"):
            said = {} if amount is None else {"epochs": None, "steps": None, kind: int(amount)}
            return variant.steps(images, **said)
        price = prices[kind]
        if amount is None:
            amount = first.steps(images) * price[first.name]
        steps = round(amount / price[variant.name])
        if steps < 1:
            raise MapetError(
                f"{amount:.3g} {kind} are less than an optimiser step of {variant.name!r}, which takes "
                f"{price[variant.name]:.3g}; take a larger budget or a smaller --batch-size"
            )
        return variant.steps(images, epochs=None, steps=steps)

    return [
        {budget: spend(variant, kind, amount) for budget, (kind, amount) in config.budgets.items()}
        for variant in compared
    ]


def _time_steps(trained: Sequence[Variant], root: Path) -> dict[str, float]:
    """Return the minutes of a step, measured once: measured again they would be others, and so would the cells."""
    file = root / "times.json"
    known = _known_times(file)
    keys = {
        variant.name: json.dumps([variant.tokenizer, _decisive(variant.values)], sort_keys=True) for variant in trained
    }
    for variant in trained:
        if keys[variant.name] not in known:
            logger.info("timing %s", variant.name)
            values = {**variant.values, **({"tokenizer": variant.tokenizer} if variant.tokenizer else {})}
            known[keys[variant.name]] = time_step(values) / 60
            replace_file(file, json.dumps(known, indent=1) + "\n")
    return {name: known[key] for name, key in keys.items()}


def _known_times(file: Path) -> dict[str, float]:
    try:
        known = json.loads(file.read_text())
        return {key: float(minutes) for key, minutes in known.items() if minutes > 0}
    except FileNotFoundError:
        return {}
    except (AttributeError, TypeError, ValueError) as error:
        raise MapetError(
            f"{file} is damaged ({error}); restore it, or remove it and the cells of budgets in minutes begin anew"
        ) from error
