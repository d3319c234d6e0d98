"""The configuration of a comparison of pre-trainings."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mapet.config.base import Common, StrictConfig
from mapet.config.keys import LearningRate

Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Measure = Literal["knn", "linear", "attentive", "finetune"]


class CompareConfig(StrictConfig):
    """What differs between the cells of a comparison, and how they are measured.

    All other keys of its recipe are those of pre-training, the same for every cell.
    """

    data: str = Field(
        min_length=1,
        description="labelled images: one subfolder per class, perhaps below train and test (or val), or a demo set; "
        "the labels are for the measures alone",
    )
    objectives: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("mapet", "pim", "mim", "random"),
        description="objectives to compare, an arm each; random: the network as it begins",
        json_schema_extra=Common,
    )
    tokenizers: Names = Field(
        ("pixels",),
        description="what --tokenizer of pretrain takes; an objective that needs none is trained once",
        json_schema_extra=Common,
    )
    arms: dict[Annotated[str, Field(min_length=1)], dict[str, Any]] = Field(
        default_factory=dict,
        description="further arms by name, or what one of the objectives has of its own: the keys of pre-training in "
        "which it differs, as half='{objective: mapet, context_tokens: 8}'",
    )
    seeds: int = Field(3, ge=1, le=1000, description="repetitions, with the seeds 0, 1, ...", json_schema_extra=Common)
    budget: Names = Field(
        ("epochs",),
        description="what the arms have equal: epochs, steps, flops or minutes, perhaps with how many of them as "
        "flops=2e14; several make several tables. Default of epochs and steps: the recipe's; of flops and minutes: "
        "what the first arm needs for that",
        json_schema_extra=Common,
    )
    lrs: Annotated[tuple[LearningRate, ...], Field(max_length=100)] = Field(
        (),
        description="peak learning rates to choose from, in place of lr: each arm tries each of them once, with a seed "
        "of its own and under the first budget; the best by the first probe of measures, on training images held out, "
        "is taken for all seeds and budgets",
        json_schema_extra=Common,
    )
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)] = Field(
        ("knn", "linear"),
        description="how the outcome is measured: knn, linear, attentive, finetune",
        json_schema_extra=Common,
    )
    knn: dict[str, Any] = Field(default_factory=dict, description="keys of mapet eval knn, as k=20")
    linear: dict[str, Any] = Field(default_factory=dict, description="keys of mapet eval linear, as steps=500")
    attentive: dict[str, Any] = Field(default_factory=dict, description="keys of mapet eval attentive, as steps=500")
    finetune: dict[str, Any] = Field(
        default_factory=dict, description="keys of mapet finetune, as labels_per_class=10 steps=100"
    )

    @field_validator("lrs", mode="before")
    @classmethod
    def _a_choice(cls, rates: Any) -> Any:
        if isinstance(rates, int | float | str) or (isinstance(rates, list | tuple) and len(rates) == 1):
            raise ValueError("a single rate leaves no choice; name several, or this one as lr")
        return () if rates is None else rates

    @field_validator("budget")
    @classmethod
    def _budgets(cls, budgets: tuple[str, ...]) -> tuple[str, ...]:
        for budget in budgets:
            kind, equals, amount = budget.partition("=")
            if kind not in ("epochs", "steps", "flops", "minutes"):
                raise ValueError(f"{budget!r} names no budget; take epochs, steps, flops or minutes")
            number = _number(amount) if equals else 1.0
            if number is None or not 0 < number < 1e30 or (kind in ("epochs", "steps") and number % 1):
                raise ValueError(f"{budget!r} has no amount that can be spent; write for instance {kind}=4")
        if len(set(budgets)) < len(budgets):
            raise ValueError("a budget is named twice")
        return budgets

    @field_validator("objectives", "tokenizers", "lrs", "measures")
    @classmethod
    def _no_twins(cls, names: tuple[Any, ...]) -> tuple[Any, ...]:
        twins = sorted({name for name in names if names.count(name) > 1})
        if twins:
            raise ValueError(f"{twins[0]!r} is named twice")
        return names

    @field_validator("objectives", "tokenizers", "arms")
    @classmethod
    def _can_be_shown(cls, named: Any) -> Any:
        for name in named:
            if not name.isprintable():
                raise ValueError(f"{name!r} has characters that cannot be shown in a table; choose another name")
        return named

    @model_validator(mode="after")
    def _something_to_compare(self) -> Self:
        if not self.differing:
            raise ValueError("there are neither objectives nor arms; name what is to be compared")
        if self.lrs and self.judge is None:
            raise ValueError("lrs are chosen from by a probe, but measures name none; add knn, linear or attentive")
        return self

    @property
    def judge(self) -> Measure | None:
        """The probe that learning rates are chosen by: the first of the measures; None if there is none."""
        return next((kind for kind in self.measures if kind != "finetune"), None)

    @property
    def differing(self) -> dict[str, dict[str, Any]]:
        """The arms by name: the keys of pre-training in which each differs from the others."""
        return {name: {} for name in self.objectives} | dict(self.arms)

    @property
    def budgets(self) -> dict[str, tuple[str, float | None]]:
        """By the name of a budget: its kind, and how much of it, if that was said."""
        parts = {budget: budget.partition("=") for budget in self.budget}
        return {budget: (kind, _number(amount)) for budget, (kind, _, amount) in parts.items()}


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", text) else None
