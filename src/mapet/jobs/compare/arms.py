"""The arms of a comparison: what each trains, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mapet.config.base import marked, parse
from mapet.config.keys import KMeansKeys, TeacherKeys
from mapet.errors import MapetError
from mapet.jobs.compare.config import CompareConfig, read_budget
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.pretrain.flops import count_flops
from mapet.jobs.pretrain.settle import settle_run
from mapet.objectives.registry import OBJECTIVES, find_objective
from mapet.targets.tokenizer import WITHOUT_TEACHER, is_ready, ready_tokenizer
from mapet.tokenizers.base import hash_content
from mapet.tokenizers.teachers import build_teacher

UNTRAINED = "random"  # instead of an objective: the network with its random initial weights
# Keys of a single run that each arm may have nevertheless.
OF_AN_ARM = {"objective", "tokenizer"}
NOT_OF_AN_ARM = (marked(PretrainConfig, "single") | {"data", "epochs", "steps"}) - OF_AN_ARM
# Keys that all arms share but runs with these targets have no use for.
UNUSED = {
    "ids": {"teacher"},
    "features": KMeansKeys.model_fields.keys() - TeacherKeys.model_fields.keys(),
    "pixels": {"teacher", *KMeansKeys.model_fields},
}


@dataclass(frozen=True)
class Arm:
    """What is compared: keys of pre-training, with one tokenizer.

    Attributes:
        name: as the user called it.
        tokenizer: its name; "" for targets that are not token ids.
        values: of pre-training, checked.
        config: the settled configuration of a run with seed 0.
        flops: of one image, forward and backward; 0 if the arm is not trained.
        content: hash of a fitted tokenizer or of a teacher; None if there is neither.
    """

    name: str
    tokenizer: str
    values: Mapping[str, Any]
    config: PretrainConfig
    flops: float
    content: str | None

    @property
    def label(self) -> str:
        """A row of the tables."""
        return f"{self.name}, {self.tokenizer}" if self.tokenizer else self.name

    @property
    def is_trained(self) -> bool:
        """Whether the arm is more than the initial network."""
        return self.flops > 0

    def decisive(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that the outcome depends on; tokenizers and teachers count by content, not by name."""
        by_content = {"tokenizer", "teacher", "teacher_weights"} if self.content is not None else set()
        ignored = marked(PretrainConfig, "free") | by_content
        return {key: value for key, value in values.items() if key not in ignored} | {"content": self.content}

    def count_steps(self, budget: str, first: Arm, images: int) -> int:
        """Return the optimiser steps that a budget buys.

        Args:
            budget: see ``read_budget``.
            first: the arm whose FLOPs are the default amount.
            images: in the training set.

        Raises:
            MapetError: if it buys none, or too many.
        """
        kind, amount = read_budget(budget)
        if not self.is_trained:
            return 0
        if kind == "flops":
            spent = first.flops * first.config.batch_size * first.config.steps if amount is None else amount
            kind, amount = "steps", round(spent / (self.flops * self.config.batch_size))
            if amount < 1:
                raise MapetError(
                    f"{spent:.3g} FLOPs are less than an optimiser step of {self.label!r}; take a larger budget or a "
                    "smaller --batch-size"
                )
        if amount is None:
            return self.config.steps
        return settle_run({**self.values, "epochs": None, "steps": None, kind: int(amount)}, images).steps


def build_arms(config: CompareConfig, shared: Mapping[str, Any], images: int) -> Iterator[Arm]:
    """Yield each arm with each of its tokenizers.

    Args:
        config: of the comparison.
        shared: values of pre-training that all arms share.
        images: in the training set.

    Raises:
        MapetError: naming an arm that cannot work.
    """
    read_teacher.cache_clear()  # its files may have changed
    shared_by_all = NOT_OF_AN_ARM | ({"lr"} if config.lrs else set())
    named: dict[str, dict[str, Any]] = {name: {} for name in config.objectives}
    for name, own in (named | config.arms).items():
        if "objective" not in own and name in (*OBJECTIVES, UNTRAINED) and name not in (config.objectives or [name]):
            continue  # keys of an objective that is not compared
        for key in shared_by_all & own.keys():
            raise MapetError(f"arm {name!r} has its own {key!r}, which must be the same for all; leave it out")
        try:
            yield from _with_tokenizers(name, own, config.tokenizers, shared, images)
        except MapetError as error:
            raise MapetError(f"arm {name!r} cannot work: {error}") from error


def _with_tokenizers(
    name: str, own: Mapping[str, Any], tokenizers: tuple[str, ...], shared: Mapping[str, Any], images: int
) -> Iterator[Arm]:
    objective, targets = str(own.get("objective", name)), "pixels"
    if objective != UNTRAINED:
        targets = {**shared, **own}.get("targets") or find_objective(objective).default_targets
    useful = {key: value for key, value in shared.items() if key not in UNUSED.get(targets, UNUSED["pixels"])}
    given = {**useful, **own, "objective": objective, "targets": targets}
    if targets != "ids":
        tokenizers = ("",)
    for tokenizer in [own["tokenizer"]] if own.get("tokenizer") else tokenizers:
        values = parse(PretrainConfig, {**given, "tokenizer": tokenizer or None})
        if objective == UNTRAINED:  # the network is the same whatever the objective
            yield Arm(name, "", values, settle_run({**values, "objective": "mapet"}, images), 0.0, None)
            continue
        settled = settle_run(values, images)
        width, content = open_target(settled)
        yield Arm(name, tokenizer, values, settled, count_flops(settled, width), content)


def open_target(config: PretrainConfig) -> tuple[int, str | None]:
    """Return the number of token ids or the width of features (0 for pixels), and a hash of what makes them.

    The hash is that of a fitted tokenizer or of a teacher; None where there is neither.

    Raises:
        MapetError: if tokenizer or teacher cannot be had, or do not fit the network.
    """
    name = config.teacher if config.targets == "features" else config.tokenizer
    if name is None or name in WITHOUT_TEACHER:
        return config.vocab_size or 0, None
    if config.targets == "ids" and is_ready(name):
        side = config.image_size // config.patch_size
        tokenizer = ready_tokenizer(name, config, (side, side))
        return tokenizer.vocab_size, tokenizer.content_hash
    size = config.teacher_size or config.image_size
    width, content = read_teacher(name, config.teacher_stage, config.teacher_weights, size)
    return config.vocab_size or width, content


@cache  # large teachers take long to load
def read_teacher(name: str, stage: int | str | None, weights: str | None, size: int) -> tuple[int, str]:
    """Return the width of a teacher's features, and a hash of its weights, stage, normalisation and architecture.

    Args:
        name, stage, weights: see ``build_teacher``.
        size: side in pixels of the images that it reads.

    Raises:
        MapetError: if there is no such teacher, or it cannot read images of the size.
    """
    teacher = build_teacher(name, stage, weights)
    content = {key: value for key, value in teacher.config.items() if key != "name"}
    return teacher.width(size), hash_content(content, teacher)
