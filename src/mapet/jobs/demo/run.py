"""The demo: pre-train on a small real data set, then measure the gain."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from mapet.data.labelled import open_labelled
from mapet.data.views import PlainView
from mapet.engine.files import replace_file
from mapet.engine.runfolder import RunFolder
from mapet.engine.trainer import Result
from mapet.errors import MapetError
from mapet.jobs.finetune.run import finetune
from mapet.jobs.pretrain.run import pretrain
from mapet.jobs.pretrain.settle import initial_backbone
from mapet.probes.rows import Row, probe_row

logger = logging.getLogger(__name__)

LABELS_PER_CLASS = (10, 40)
FINETUNING: dict[str, Any] = {
    "steps": 100,
    "batch_size": 32,
    "lr": 1e-3,
    "min_lr": 0.0,
    "warmup": 0.1,
    "layer_decay": None,
    "drop_path": 0.0,
    "crop_pct": 1.0,
    "crop_min": 0.6,
    "flip": 0.0,
    "augment": None,
    "color_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "smoothing": 0.0,
    "eval_every": 1000,
}


def run_demo(
    values: Mapping[str, Any],
    out: Path,
    *,
    labels_per_class: Sequence[int] = LABELS_PER_CLASS,
    finetuning: Mapping[str, Any] = FINETUNING,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[Result, dict[str, Row] | None]:
    """Pre-train, measure, and write ``results.json`` beside the run.

    Args:
        values: configuration whose ``data`` is a labelled demo set.
        out: the run folder.
        labels_per_class: for each number, a fine-tuning with so many labels is run in ``out/finetuned``.
        finetuning: configuration of the fine-tunings by key, see ``FinetuneConfig``.
        resume: continue an interrupted demo.
        console: where progress is shown.

    Returns:
        the run, and rows of accuracies in 0..1; None instead of the rows if the demo was stopped early, and on
        processes other than the main one.
    """
    if values.get("init") is not None:
        raise MapetError("the demo compares with random weights; leave --init out, or use mapet pretrain")
    result = pretrain(values, out, resume=resume, console=console)
    if not result.finished:
        return result, None
    rows = measure_run(result, labels_per_class, finetuning, console)
    if rows is not None:
        replace_file(result.folder.results, json.dumps(rows, indent=2) + "\n")
    return result, rows


def measure_run(
    result: Result, labels_per_class: Sequence[int], finetuning: Mapping[str, Any], console: Console | None = None
) -> dict[str, Row] | None:
    """Measure raw pixels, the untrained and the pre-trained network on the labelled data of the run.

    The untrained network is probed with the weights that pre-training began with, and fine-tuned from other random
    weights. All processes call the function, because they fine-tune together.

    Returns:
        the rows; None if a fine-tuning was stopped, and on processes other than the main one.
    """
    config = result.config
    train, test = open_labelled(config.data, config.seed)
    view = PlainView((config.image_size, config.image_size), config.mean, config.std)
    pretrained = result.task.outcome()
    device = next(pretrained.parameters()).device
    rows: dict[str, Row] = {}

    def probe(name: str, network: nn.Module) -> None:
        if result.is_main:
            logger.info("measuring %s: k-NN and linear probe", name)
            rows[name] = probe_row(network, train, test, view, channels=config.channels)

    probe("raw_pixels", nn.Flatten())
    for name, backbone in (("random_vit", initial_backbone(config).to(device)), ("pretrained_vit", pretrained)):
        probe(name, backbone)
        for count in labels_per_class:
            labels = count * len(train.classes)
            values = {"model": str(result.exported), "reinit": name == "random_vit", "labels_per_class": count}
            values |= {"data": config.data, "seed": config.seed, **finetuning}
            out = result.folder.root / "finetuned" / f"{name}-{labels}"
            # A resumed fine-tuning keeps its recorded model: the run's folder may have been moved since.
            tuned = finetune({} if RunFolder(out).config.exists() else values, out, resume=True, console=console)
            if not tuned.finished:
                return None
            if tuned.is_main:
                rows[name][f"finetune_{labels}"] = tuned.measured["accuracy"]
    return rows if result.is_main else None
