"""Which labelled images a fine-tuning sees."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from mapet.config.base import make_config, read_recipe
from mapet.data.open import open_labelled
from mapet.data.sources import ImageSet, few_per_class, share_per_class
from mapet.engine.runfolder import run_of
from mapet.errors import MapetError
from mapet.jobs.finetune.config import FinetuneConfig


def labels_to_use(config: FinetuneConfig, train: ImageSet) -> ImageSet:
    """Return the labelled images that fine-tuning may see: all, a share of each class, or so many of each."""
    if config.label_share is not None:
        return share_per_class(train, config.label_share, config.seed)
    if config.labels_per_class is not None:
        return few_per_class(train, config.labels_per_class, config.seed)
    return train


def count_seen(model: str, images: ImageSet) -> int | None:
    """Count the files of ``images`` that a fine-tuned run learned from; None if nothing tells.

    Args:
        model: see ``engine.run_of``.
        images: any.
    """
    run = run_of(model)
    if run is None:
        return None
    try:
        config = make_config(FinetuneConfig, read_recipe(run.config))
        seen = labels_to_use(config, open_labelled(config.data, config.seed)[0])
    except MapetError:  # a run of another command, or its images are gone
        return None
    return len(_files(images) & _files(seen))


def _files(images: ImageSet) -> set[Path]:
    """Return where files lie, whatever their folder was called; images in memory are in none."""
    real = cache(Path.resolve)
    return {real(item.parent) / item.name for item in images.items if isinstance(item, Path)}
