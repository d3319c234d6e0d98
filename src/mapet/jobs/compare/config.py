"""The configuration of a comparison of pre-trainings."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from mapet.config.base import Anything, Config, from_text, key
from mapet.config.keys import LearningRate, Text

Names = Annotated[tuple[Text, ...], Field(min_length=1)]
Kind = Literal["knn", "linear", "attentive", "finetune"]
Keys = Annotated[dict[str, Anything], BeforeValidator(from_text)]

# What is equal, perhaps with an amount: a whole number of epochs or steps, any number of FLOPs.
BUDGET = re.compile(r"(epochs|steps)(=[1-9]\d*(e\+?\d)?)?|flops(=\d+(\.\d+)?(e\+?\d{1,2})?)?")


class CompareConfig(Config):
    """What differs between the runs of a comparison, and how they are measured.

    The other keys of a comparison are those of pre-training and hold for every run.
    """

    data: Text = key(
        ...,
        "labelled images: one subfolder per class, perhaps below train and test (or val), or a demo set; only the "
        "measures use the labels",
    )
    objectives: tuple[Text, ...] = key(
        ("mapet", "pim", "mim", "random"),
        "objectives to compare, an arm each; random: the network with its random initial weights",
        common=True,
    )
    tokenizers: Names = key(
        ("pixels",),
        "tokenizers to compare, as --tokenizer of pretrain takes them; an objective without token ids is trained once",
        common=True,
    )
    arms: dict[Text, Keys] = key(
        {},
        "further arms by name, each with the keys of pre-training in which it differs, as half='{objective: mapet, "
        "mask_ratio: 0.5}'; an objective's name as arm gives keys to that objective alone",
    )
    seeds: int = key(3, "repetitions, with the seeds 0, 1, ...", common=True, ge=1, le=1000)
    budget: Names = key(
        ("epochs",),
        "what the arms have equal: epochs, steps or flops, perhaps with an amount, as flops=2e14; each makes a table. "
        "Default amount: the epochs or steps of the recipe; the FLOPs of the first arm for these",
        common=True,
    )
    lrs: Annotated[tuple[LearningRate, ...], Field(min_length=2, max_length=100)] = key(
        (),
        "peak learning rates to choose from, instead of lr: each arm tries each once under the first budget; the best, "
        "by the first probe of --measures on held-out training images, is taken for all seeds and budgets",
        common=True,
        instead_of="lr",
    )
    measures: Annotated[tuple[Kind, ...], Field(min_length=1)] = key(
        ("knn", "linear"), "how a network is measured: knn, linear, attentive, finetune", common=True
    )
    knn: Keys = key({}, "keys of mapet eval knn, as k=20")
    linear: Keys = key({}, "keys of mapet eval linear, as steps=500")
    attentive: Keys = key({}, "keys of mapet eval attentive, as steps=500")
    finetune: Keys = key({}, "keys of mapet finetune, as labels_per_class=10 steps=100")

    @field_validator("budget", "objectives", "tokenizers", "lrs", "measures")
    @classmethod
    def _each_once(cls, names: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        twins = [name for name in names or () if (names or ()).count(name) > 1]
        if twins:
            raise ValueError(f"{twins[0]!r} is named twice")
        return names

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Refuse unknown budgets, a comparison of nothing, and learning rates that cannot be chosen from."""
        for budget in given.get("budget", ()):
            read_budget(budget)
        if given.get("objectives") == () and not given.get("arms"):
            raise ValueError("there are neither objectives nor arms; name what is to be compared")
        if given.get("lrs") and set(given.get("measures", ())) == {"finetune"}:
            raise ValueError("a probe chooses among lrs, but measures name none; add knn, linear or attentive")

    @property
    def judge(self) -> str | None:
        """The probe that chooses among ``lrs``: the first of the measures; None if there is none."""
        return next((kind for kind in self.measures if kind != "finetune"), None)


def read_budget(text: str) -> tuple[str, float | None]:
    """Return what a budget counts, and its amount if one is given.

    Raises:
        ValueError: for another kind of budget, or an amount that is not positive and, of epochs and steps, whole.
    """
    if not BUDGET.fullmatch(text):
        raise ValueError(
            f"{text!r} is no budget; take epochs, steps or flops, perhaps with an amount, as in flops=2e14"
        )
    kind, _, amount = text.partition("=")
    return kind, float(amount) if amount else None
