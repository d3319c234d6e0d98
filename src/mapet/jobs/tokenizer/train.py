"""Training a VQ-KD tokenizer on the engine, like any objective."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mapet.data.batches import Batch, ViewDataset
from mapet.data.decode import check_channels
from mapet.data.open import open_images
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.views import TrainView
from mapet.engine.loop import on_main
from mapet.engine.optimizer import build_optimizer
from mapet.engine.processes import count_workers, main_first, make_accelerator
from mapet.engine.runfolder import RunFolder
from mapet.engine.sinks import Record
from mapet.engine.training import Job, begin_run, check_out, run_folder, run_job, settle_config
from mapet.jobs.tokenizer.config import VQKDConfig
from mapet.jobs.tokenizer.vqkd_objective import VQKDObjective
from mapet.tokenizers.base import Grid, hash_content
from mapet.tokenizers.files import save_tokenizer
from mapet.tokenizers.kfeatures import features_on_grid
from mapet.tokenizers.teachers import Teacher, build_teacher
from mapet.tokenizers.vqkd import VQKD


def train_vqkd(
    values: Mapping[str, Any], out: str | Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train a VQ-KD tokenizer into ``out/tokenizer``, which is written at every checkpoint.

    Args:
        values: configuration by key, see ``VQKDConfig``; ``data`` and ``teacher`` are needed.
        out: the run folder.
        resume: continue the run in ``out`` exactly, or begin it if there is none.
        console: where progress is shown; None for standard error.

    Returns:
        ``steps``, ``total_steps``, ``stopped_by`` (a signal or None), ``tokenizer`` (its folder), ``is_main``.

    Raises:
        MapetError: for input that cannot work; nothing is lost or half-written.
    """
    with run_folder(out) as folder:
        config = settle_config(VQKDConfig, values, folder, resume)
        return _run(config, folder, resume, console or Console(stderr=True))


def _run(config: VQKDConfig, folder: RunFolder, resume: bool, console: Console) -> dict[str, Any]:
    check_channels(config.channels)
    accelerator = make_accelerator(config.precision, config.accumulate)
    device = accelerator.device
    check_out(config.data, folder.root)
    images = main_first(accelerator, lambda: open_images(config.data))
    teacher = main_first(
        accelerator, lambda: build_teacher(config.teacher, config.teacher_stage, config.teacher_weights)
    )
    config = config.resolve(len(images), accelerator.num_processes).model_copy(
        update={"precision": accelerator.mixed_precision}
    )

    torch.manual_seed(fold_seed(config.seed, Stream.WEIGHTS))
    half = [0.5] * config.channels
    tokenizer = VQKD(
        config.image_size,
        config.patch_size,
        config.embed_dim,
        config.depth,
        config.num_heads,
        config.vocab_size,
        config.code_dim,
        half,
        half,
    )
    targets = TeacherFeatures(teacher.to(device), config.teacher_size or config.image_size, tokenizer.grid)
    objective = VQKDObjective(tokenizer, targets.width, config.decoder_depth, config.ema_decay).to(device)

    on_main(accelerator, lambda: begin_run(folder, config, resume))
    view = TrainView(
        config.image_size, targets.size, config.crop_min, config.flip, config.color_jitter, tuple(half), tuple(half)
    )
    dataset = ViewDataset(images, view, config.channels, Draws(config.seed, config.seed))
    product = (folder.tokenizer, partial(save_tokenizer, tokenizer))
    optimizer = build_optimizer(objective, config.peak_lr, config.weight_decay, config.beta2)
    job = Job(config, dataset, objective, optimizer, targets, targets.content_hash, product, _describe)
    outcome = run_job(job, folder, accelerator, count_workers(config.workers, images, device), console)
    accelerator.wait_for_everyone()
    return {
        "steps": outcome.steps,
        "total_steps": outcome.total_steps,
        "stopped_by": outcome.stopped_by,
        "tokenizer": str(folder.tokenizer),
        "is_main": accelerator.is_main_process,
    }


class TeacherFeatures:
    """What is distilled: a frozen teacher's features ``(B, P, d)`` of the very view that the encoder sees.

    Args:
        teacher: on its device.
        size: side of its input in pixels.
        grid: rows and columns of patches; the teacher's map is resized to it.
    """

    def __init__(self, teacher: Teacher, size: int, grid: Grid) -> None:
        self.width = teacher.width(size)
        self.content_hash = hash_content([teacher.config, size], teacher)
        self.size, self._teacher, self._grid = size, teacher, grid

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor]:
        """Return the features of a batch's views."""
        views = batch["tokenizer_images"].to(self._teacher.mean.device, non_blocking=True)
        return (features_on_grid(self._teacher, views, self.size, self._grid),)


def _describe(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}  cosine to the teacher {record['cosine']:.3f}  "
        f"codes used in a batch {record['codes_used']:.1%}"
    )
