"""A model on its device and the options of ``inference.streaming.stream``, from a configuration."""

from typing import Any

from mapet.config.keys import InferenceKeys
from mapet.data.batches import DamageTally
from mapet.data.sources import ImageSet
from mapet.engine.parallel import check_precision
from mapet.engine.processes import count_workers, one_device
from mapet.inference.models import OpenModel, open_model


def open_on_device(config: InferenceKeys, *, classifier: bool) -> OpenModel:
    """Open the model of a configuration and move it to the device, see ``open_model`` and ``one_device``."""
    device = one_device()
    check_precision(config.precision)
    opened = open_model(
        config.model,
        classifier=classifier,
        image_size=config.image_size,
        crop_pct=config.crop_pct,
        reinit=config.reinit,
        seed=config.seed,
    )
    opened.network.to(device)
    return opened


def stream_options(config: InferenceKeys, opened: OpenModel, images: ImageSet) -> dict[str, Any]:
    """Return the keyword arguments of ``inference.streaming.stream``; ``tally`` counts the damaged images."""
    return {
        "device": opened.device,
        "batch_size": config.batch_size,
        "workers": count_workers(config.workers, images, opened.device),
        "precision": config.precision,
        "tally": DamageTally(images, config.max_damaged),
    }
