"""Configurations whose numbers are measured on the images when a run begins."""

from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from mapet.config.base import Measured
from mapet.config.keys import InputKeys
from mapet.data.reading import Reading
from mapet.data.sources import ImageSet
from mapet.data.statistics import measure_normalisation, measure_range
from mapet.engine.parallel import count_workers, on_main

AnyInput = TypeVar("AnyInput", bound=InputKeys)


def with_measured(config: AnyInput, images: ImageSet) -> AnyInput:
    """Return the configuration with numbers in place of ``Measured``; all processes call it and get the same numbers.

    Raises:
        MapetError: if they cannot be measured.
    """
    if not any(isinstance(value, Measured) for _, value in config):
        return config
    changes = broadcast_object_list([on_main(lambda: _measure(config, images))])[0]
    return config.but(**changes)


def _measure(config: Any, images: ImageSet) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    workers = count_workers(config.workers, images, torch.device("cpu"))
    if isinstance(config.value_range, Measured):
        changes["value_range"] = measure_range(images, Reading.of(config.but(value_range=None)), config.seed, workers)
    reading = Reading.of(config.but(**changes))
    wanted = [name for name in ("mean", "std") if isinstance(getattr(config, name, None), Measured)]
    if wanted:
        mean, std = measure_normalisation(images, reading, config.image_size, config.max_damaged, config.seed, workers)
        changes |= {name: {"mean": mean, "std": std}[name] for name in wanted}
    return changes
