"""The configuration of fine-tuning; the defaults are upstream's recipe for ViT-Base."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from mapet.config.base import CHOSEN, default_of, key
from mapet.config.keys import Count, LeastRate, ModelKeys, Share, Text, TrainKeys

# Names of timm's augmentation policies. timm ignores parts of a name that it does not understand.
POLICY = (
    r"rand(-(m|n|p|mstd|mmax|inc)\d+(\.\d+)?)*|augmix(-(m|w|d|a|b|mstd)\d+(\.\d+)?)*"
    r"|(original|originalr|v0|v0r|3a)(-mstd\d+(\.\d+)?)?"
)


class FinetuneConfig(TrainKeys, ModelKeys):
    """What decides a fine-tuning."""

    default_epochs: ClassVar[int] = 100
    default_batch: ClassVar[int] = 512
    published_rate: ClassVar[tuple[float, int]] = 5e-4, 512

    data: Text = key(
        ...,
        "labelled images: one subfolder per class, perhaps below train and test (or val), or a demo set",
        common=True,
        free=True,
    )
    label_share: float | None = key(
        None, "share of each class's labels that is used, at least one; 1: all", common=True, gt=0, le=1
    )
    labels_per_class: Count | None = key(None, "labels of each class that are used; default: all", common=True)
    min_lr: LeastRate = key(1e-6, "learning rate at the end of the cosine")
    warmup: float = key(0.2, "share of the run that warms up", ge=0, lt=1)
    layer_decay: float | None = key(
        0.65,
        "the learning rate shrinks by this factor from each block to the one before it; null (flag: none): the same "
        "for all",
        gt=0,
        le=1,
    )
    pool: Literal["mean", "class"] | None = key(
        None, "what the classifier reads: the mean over patches or the class token; default: the model's"
    )
    drop_path: float = key(0.1, "stochastic depth rate of the last block", ge=0, lt=1)
    crop_pct: float | None = key(
        0.9, "share of the resized image's side that is seen when the model is measured", ge=0.01, le=1
    )
    crop_min: float = key(0.08, "least share of the image that a random crop covers", gt=0, le=1)
    flip: Share = key(0.5, "probability of a horizontal flip")
    augment: str | None = key(
        "rand-m9-mstd0.5-inc1",
        "timm's name of an augmentation policy, for 1 and 3 channels; null (flag: none): colour jitter only",
    )
    color_jitter: Share = key(
        0.4, "jitter of brightness, contrast and (3 channels only) saturation, where there is no --augment"
    )
    erasing: Share = key(0.25, "probability of erasing a rectangle")
    mixup: float = key(0.8, "alpha of mixup; 0: none", ge=0, le=1e3)
    cutmix: float = key(1.0, "alpha of cutmix, which alternates with mixup; 0: none", ge=0, le=1e3)
    smoothing: float = key(0.1, "label smoothing", ge=0, lt=1)
    ema_decay: float | None = key(
        None, "moving average of the weights, which is then measured and exported, as 0.9999", gt=0, lt=1
    )
    eval_every: Count = key(
        CHOSEN,
        "epochs between measurements on the test part (and one at the end); default: a tenth of the run",
        free=True,
    )

    @field_validator("augment")
    @classmethod
    def _known_policy(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(POLICY, name):
            raise ValueError("none of timm's policies; take for instance rand-m9-mstd0.5-inc1, augmix-m5 or none")
        return name

    @classmethod
    def check_together(cls, given: Mapping[str, Any]) -> None:
        """Refuse both ways of using few labels at once."""
        super().check_together(given)
        if given.get("label_share") is not None and given.get("labels_per_class") is not None:
            raise ValueError("give label_share or labels_per_class, not both")

    @classmethod
    def images_together(cls, given: Mapping[str, Any]) -> int:
        """Return 2 with mixup or cutmix, which pair images."""
        return 2 if any(given.get(name, default_of(cls, name)) for name in ("mixup", "cutmix")) else 1

    @classmethod
    def choose(cls, given: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Fill in what follows from the number of images; see ``TrainKeys.choose``."""
        chosen = super().choose(given, **facts)
        epochs = chosen["steps"] // (facts["images"] // chosen["batch_size"])
        return {**chosen, "eval_every": given.get("eval_every", max(1, epochs // 10))}
