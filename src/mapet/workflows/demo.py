"""The demo: pre-train on a small real data set, then measure what it was good for."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mapet.config import PretrainConfig
from mapet.data import PlainView, open_labelled
from mapet.engine import replace_file
from mapet.errors import MapetError
from mapet.evaluate import FinetuneRecipe, Row, finetune_row, probe_row
from mapet.workflows.pretrain import RunResult, initial_backbone, pretrain

logger = logging.getLogger(__name__)

LABEL_COUNTS = (100, 400)


def run_demo(
    values: Mapping[str, Any],
    out: Path,
    *,
    label_counts: tuple[int, ...] = LABEL_COUNTS,
    recipe: FinetuneRecipe | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[RunResult, dict[str, Row] | None]:
    """Pre-train, measure, and write ``results.json`` beside the run.

    Args:
        values: configuration whose ``data`` is a labelled demo set.
        out: the run folder.
        label_counts: how many labels the fine-tunings get.
        recipe: of the fine-tunings.
        resume: continue an interrupted demo.
        console: where progress is shown.

    Returns:
        the run and its rows of accuracies in 0..1; no rows if it was stopped early, or on any process but the
        main one.
    """
    if values.get("init") is not None:
        raise MapetError("the demo compares with random weights; leave --init out, or use mapet pretrain")
    result = pretrain(values, out, resume=resume, console=console)
    if result.steps < result.total_steps or not result.is_main:
        return result, None
    rows = measure_run(result.config, result.objective.backbone, label_counts, recipe or FinetuneRecipe())
    replace_file(result.folder.root / "results.json", json.dumps(rows, indent=2) + "\n")
    return result, rows


def measure_run(
    config: PretrainConfig, pretrained: VisionTransformer, label_counts: tuple[int, ...], recipe: FinetuneRecipe
) -> dict[str, Row]:
    """Measure raw pixels, the untrained network and the pre-trained one on the run's own labelled data.

    The untrained network is the very one that pre-training began with, so the rows differ in nothing else.
    """
    train, test = open_labelled(config.data, config.seed)
    view = PlainView((config.image_size, config.image_size), config.input_mean, config.input_std)
    device = next(pretrained.parameters()).device
    logger.info("measuring raw pixels")
    rows = {"raw_pixels": probe_row(nn.Flatten(), train, test, view, channels=config.channels)}
    for name, backbone in (("random_vit", initial_backbone(config).to(device)), ("pretrained_vit", pretrained)):
        logger.info("measuring %s: k-NN and linear probe", name)
        rows[name] = probe_row(backbone, train, test, view, channels=config.channels)
        logger.info("measuring %s: fine-tuning with %s labels", name, " and ".join(map(str, label_counts)))
        rows[name] |= finetune_row(
            backbone, train, test, view, recipe, label_counts, channels=config.channels, seed=config.seed
        )
    return rows
