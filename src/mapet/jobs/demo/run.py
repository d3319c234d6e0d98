"""The demo: pre-train on a small real data set, then measure the gain."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from mapet.config.recipes import load_recipe
from mapet.data.open import open_labelled
from mapet.data.reading import Reading
from mapet.data.views import PlainView
from mapet.engine.files import replace_file
from mapet.engine.runfolder import RunFolder
from mapet.engine.trainer import Result
from mapet.errors import MapetError
from mapet.jobs.finetune.config import FinetuneConfig
from mapet.jobs.finetune.run import finetune
from mapet.jobs.pretrain.run import pretrain
from mapet.jobs.pretrain.settle import initial_backbone
from mapet.probes.rows import Row, probe_row

logger = logging.getLogger(__name__)

FINETUNING = load_recipe("finetune_demo", FinetuneConfig)


def run_demo(
    values: Mapping[str, Any],
    out: Path,
    *,
    labels_per_class: Sequence[int] = (10, 40),
    finetuning: Mapping[str, Any] = FINETUNING,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[Result, dict[str, Row] | None]:
    """Pre-train, measure, and write ``results.json`` beside the run.

    Raw pixels, the untrained and the pre-trained network are measured on the labelled data of the run. The untrained
    network is probed with the weights that pre-training began with, and fine-tuned from other random weights.

    Args:
        values: configuration whose ``data`` is a labelled demo set.
        out: the run folder.
        labels_per_class: for each number, a fine-tuning with so many labels is run in ``out/finetuned``.
        finetuning: configuration of the fine-tunings by key, see ``FinetuneConfig``.
        resume: continue an interrupted demo.
        console: where progress is shown.

    Returns:
        the run, and rows of accuracies in 0..1; None instead of the rows on processes other than the main one, and if
        the demo was stopped early, then with what was stopped, the run or a fine-tuning.
    """
    if values.get("init") is not None:
        raise MapetError("the demo compares with random weights; leave --init out, or use mapet pretrain")
    result = pretrain(values, out, resume=resume, console=console)
    if not result.finished:
        return result, None
    config = result.config
    train, test = open_labelled(config.data, config.seed)
    view = PlainView((config.image_size, config.image_size), config.mean, config.std)
    pretrained = result.task.outcome()
    untrained = initial_backbone(config).to(next(pretrained.parameters()).device)
    rows: dict[str, Row] = {}
    for name, network in (("raw_pixels", nn.Flatten()), ("random_vit", untrained), ("pretrained_vit", pretrained)):
        if result.is_main:
            logger.info("measuring %s: k-NN and linear probe", name)
            rows[name] = probe_row(network, train, test, view, reading=Reading.of(config))
        for count in labels_per_class if name != "raw_pixels" else ():  # all processes fine-tune together
            labels = count * len(train.classes)
            own = {"model": str(result.exported), "reinit": network is untrained, "labels_per_class": count}
            own |= {"data": config.data, "seed": config.seed, **finetuning}
            folder = RunFolder(result.folder.root / "finetuned" / f"{name}-{labels}")
            # A resumed fine-tuning keeps its recorded model: the run's folder may have been moved since.
            tuned = finetune({} if folder.config.exists() else own, folder.root, resume=True, console=console)
            if not tuned.finished:
                return replace(tuned, folder=result.folder), None
            if result.is_main:
                rows[name][f"finetune_{labels}"] = tuned.measured["accuracy"]
    if result.is_main:
        replace_file(result.folder.results, json.dumps(rows, indent=2) + "\n")
    return result, rows or None
