"""What an objective costs: counted in FLOPs, and timed."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mapet.engine.runfolder import RunFolder
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.pretrain.run import initial_backbone, pretrain
from mapet.objectives.registry import build_objective, find_objective
from mapet.targets.tokenizer import check_fittable, is_ready, ready_tokenizer, settle_vocab_size
from mapet.tokenizers.base import hash_content
from mapet.tokenizers.teachers import build_teacher

COUNTED_IMAGES = 2
WARM_UP_STEPS, TIMED_STEPS = 5, 20


@dataclass(frozen=True)
class Cost:
    """What a pre-training costs, and what decides it.

    Attributes:
        flops: floating-point operations of one image, forward and backward, as torch counts them: the student's alone.
        batch_size: images per optimiser step.
        vocab_size: ids that its head tells apart; None without ids.
        image_size, patch_size: in pixels.
        tokenizer_hash: of a tokenizer that is not to be fitted, or of the teacher of one that is; None for others.
    """

    flops: float
    batch_size: int
    vocab_size: int | None
    image_size: int
    patch_size: int
    tokenizer_hash: str | None = None

    @property
    def step_flops(self) -> float:
        """Floating-point operations of an optimiser step."""
        return self.flops * self.batch_size


def measure_cost(
    config: PretrainConfig,
    tokenizer: str,
    images: int,
    teacher_hash: Callable[[str, int | str | None, str | None, int], str],
) -> Cost:
    """Build what a run trains, and count the operations of one image.

    Args:
        config: of the run, resolved.
        tokenizer: what ``--tokenizer`` takes; need not be fitted. "" where the objective needs none.
        images: how many there are to fit it to.
        teacher_hash: ``hash_teacher``, or what remembers its results.

    Raises:
        MapetError: if the objective, the network and the tokenizer do not go together.
    """
    backbone = initial_backbone(config)
    rows, columns = backbone.patch_embed.grid_size
    needs_ids = find_objective(config.objective).needs_ids
    vocab_size, tokenizer_hash = None, None
    if needs_ids and is_ready(tokenizer):
        ready = ready_tokenizer(tokenizer, config, (rows, columns))
        vocab_size, tokenizer_hash = ready.vocab_size, ready.content_hash
    elif needs_ids:
        check_fittable(tokenizer)
        if tokenizer != "pixels":
            size = config.teacher_size or config.image_size
            tokenizer_hash = teacher_hash(tokenizer, config.teacher_stage, config.teacher_weights, size)
        vocab_size = settle_vocab_size(tokenizer, config.vocab_size, images * rows * columns)
    objective = build_objective(
        config.objective, backbone, vocab_size, config.context_tokens, config.order, config.objective_args
    )
    inputs = [torch.zeros(COUNTED_IMAGES, config.channels, config.image_size, config.image_size)]
    if needs_ids:
        inputs.append(torch.zeros(COUNTED_IMAGES, rows * columns, dtype=torch.long))
    # Torch does not count its fused attention for CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(*inputs)["loss"].backward()
    return Cost(
        counter.get_total_flops() / COUNTED_IMAGES,
        config.batch_size,
        vocab_size,
        config.image_size,
        config.image_size // rows,
        tokenizer_hash,
    )


def hash_teacher(name: str, stage: int | str | None, weights: str | None, size: int) -> str:
    """Hash what a teacher computes: weights, stage, normalisation and architecture.

    Args:
        name, stage, weights: see ``build_teacher``.
        size: in pixels, of what it is to read.

    Raises:
        MapetError: if there is no such teacher, or it cannot read images of the size.
    """
    teacher = build_teacher(name, stage, weights)
    teacher.width(size)
    return hash_content({key: value for key, value in teacher.config.items() if key != "name"}, teacher)


FREE = Cost(0, 0, 0, 0, 0)  # of what is not trained


def time_step(values: Mapping[str, Any]) -> float:
    """Return the seconds of an optimiser step, all that belongs to it included, from a short run."""
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        length = {"epochs": None, "steps": WARM_UP_STEPS + TIMED_STEPS, "checkpoint_every": 10**6, "log_every": 1}
        pretrain({**values, **length}, Path(folder) / "run", console=Console(quiet=True))
        return step_seconds(RunFolder(Path(folder) / "run"), first=WARM_UP_STEPS)


def step_seconds(folder: RunFolder, first: int = 0) -> float:
    """Return the median of the seconds that a run's optimiser steps took, from step ``first`` on."""
    return statistics.median(
        float(line["images"] / (line["step"] + 1) / line["images_per_s"])
        for line in folder.metric_lines()
        if line["step"] >= first
    )
