"""Pre-training, from values to a run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mapet.config.base import config_to_yaml
from mapet.data.batches import DamageTally, ViewDataset, collate, draw_batches, load_batches
from mapet.data.decode import check_channels
from mapet.data.labelled import open_labelled
from mapet.data.open import open_images
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.data.views import PlainView, TrainView
from mapet.engine.files import replace_file, replace_folder
from mapet.engine.loop import Evaluator, agree, on_main
from mapet.engine.optimizer import build_optimizer
from mapet.engine.processes import count_workers, main_first, make_accelerator
from mapet.engine.runfolder import RunFolder
from mapet.engine.sinks import Record
from mapet.engine.training import Job, check_out, log_to, record_origin, run_folder, run_job, settle_config
from mapet.jobs.pretrain.config import PretrainConfig
from mapet.jobs.pretrain.start import Start, inherit, read_start
from mapet.models.export import export_network
from mapet.models.vit import build_vit
from mapet.objectives.base import Objective
from mapet.objectives.registry import build_objective, find_objective
from mapet.probes.during import probe_evaluator
from mapet.report.figures import plot_curve, plot_layout, plot_tokens
from mapet.report.progress import Baseline
from mapet.targets.fitting import FIT_EPOCH, fit_codebook
from mapet.targets.sources import NoTokens, OnlineTokens, TokenSource, open_tokens
from mapet.targets.tokenizer import (
    BASELINE_IMAGES,
    check_no_tokens,
    is_ready,
    measure_baseline,
    ready_tokenizer,
    settle_vocab_size,
    unfitted_tokenizer,
)
from mapet.tokenizers.base import Tokenizer
from mapet.tokenizers.files import load_tokenizer, save_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: the run folder.
        config: the resolved configuration.
        objective: the trained objective; ``objective.backbone`` is the timm model.
        baseline: what can be had without looking at the image; None if no ids are predicted, and on any process but the
            main one.
        steps: optimiser steps done.
        total_steps: optimiser steps of the whole run.
        stopped_by: the signal that ended it early, or None.
        is_main: whether this process is the one that reports, of those that trained together.
    """

    folder: RunFolder
    config: PretrainConfig
    objective: Objective
    baseline: Baseline | None
    steps: int
    total_steps: int
    stopped_by: int | None
    is_main: bool


def pretrain(
    values: Mapping[str, Any], out: str | Path, *, resume: bool = False, console: Console | None = None
) -> RunResult:
    """Pre-train a ViT on unlabelled images.

    Args:
        values: configuration by key, see ``PretrainConfig``; ``data`` is needed.
        out: the run folder.
        resume: continue the run in ``out`` exactly, or begin it if there is none.
        console: where progress is shown; None for standard error.

    Raises:
        MapetError: for input that cannot work; nothing is lost or half-written.
    """
    with run_folder(out) as folder:
        if not (resume and folder.config.exists()):
            values = inherit(values)
        config = settle_config(PretrainConfig, values, folder, resume)
        return _run(config, folder, resume, console or Console(stderr=True))


def _run(config: PretrainConfig, folder: RunFolder, resume: bool, console: Console) -> RunResult:
    check_channels(config.channels)
    if not find_objective(config.objective).needs_ids:
        check_no_tokens(config)
    accelerator = make_accelerator(config.precision, config.accumulate)
    device, main = accelerator.device, accelerator.is_main_process
    images = main_first(accelerator, lambda: open_images(config.data))
    check_out(config.data, folder.root)
    workers = count_workers(config.workers, images, device)
    evaluators = _evaluators(config, workers)

    # Built once without a tokenizer: what cannot work is refused before anything is fitted or written.
    config = config.resolve(len(images), accelerator.num_processes)
    backbone, start = initial_backbone(config), None
    if config.init is not None and not agree(accelerator, folder.holds_checkpoint()):
        start = main_first(accelerator, lambda: read_start(config))
        start.load_backbone(backbone, config.model)
    build = partial(build_objective, config.objective, backbone, args=config.objective_args)
    draft = build(vocab_size=2, context_tokens=config.context_tokens, order=config.order)
    if start is not None:
        start.check_parts(draft)
    config = config.model_copy(
        update={
            "patch_size": config.image_size // draft.grid[0],
            "context_tokens": draft.context_tokens,
            "order": draft.order,
            "precision": accelerator.mixed_precision,
        }
    )
    source, config = _token_source(config, draft, start, images, folder, resume, accelerator, workers, console)
    if start is not None:
        on_main(accelerator, partial(record_origin, folder, start.name))
    view = _train_view(config, source.view_size)
    draws = Draws(source.view_seed, config.seed, config.views, bool(config.mirror))
    dataset = ViewDataset(images, view, config.channels, draws, digests=source.needs_digests)

    torch.manual_seed(fold_seed(config.seed, Stream.HEAD))
    objective = build(vocab_size=source.vocab_size, context_tokens=config.context_tokens, order=config.order)
    if start is not None:
        start.load_rest(objective)
    objective.to(device)
    baseline = on_main(accelerator, lambda: _baseline(objective, source, dataset, config, workers, folder))
    on_main(accelerator, lambda: _plot_start(objective, source, dataset, config, folder))
    export = partial(
        export_network, objective.backbone, mean=config.input_mean, std=config.input_std, tag=config.objective
    )
    optimizer = build_optimizer(objective, config.peak_lr, config.weight_decay, config.beta2)
    job = Job(
        config,
        dataset,
        objective,
        optimizer,
        source,
        source.content_hash,
        (folder.exported, export),
        baseline.describe if baseline else _describe,
        evaluators,
        config.eval_every,
        save_first=start is not None,
    )
    outcome = run_job(job, folder, accelerator, workers, console)
    if main:
        plot_curve(list(folder.metric_lines()), baseline, folder.figures / "curve.png")
    accelerator.wait_for_everyone()
    return RunResult(folder, config, objective, baseline, outcome.steps, outcome.total_steps, outcome.stopped_by, main)


def initial_backbone(config: PretrainConfig) -> VisionTransformer:
    """Return the random backbone that a run with this configuration begins with, if it has no ``init``."""
    torch.manual_seed(fold_seed(config.seed, Stream.WEIGHTS))
    return build_vit(
        config.model,
        image_size=config.image_size,
        patch_size=config.patch_size,
        channels=config.channels,
        drop_path=config.drop_path,
        layer_scale=config.layer_scale,
        **config.model_args,
    )


def _token_source(
    config: PretrainConfig,
    draft: Objective,
    start: Start | None,
    images: ImageSet,
    folder: RunFolder,
    resume: bool,
    accelerator: Accelerator,
    workers: int,
    console: Console,
) -> tuple[TokenSource, PretrainConfig]:
    """Open the run folder and return where ids come from, and the configuration with all that this settles."""

    def begin() -> bool:
        folder.open(resume=resume)
        log_to(folder.log)
        return folder.tokenizer.exists()

    def keep(tokenizer: Tokenizer | None = None) -> None:
        if not folder.config.exists():  # a resumed run may yet be refused
            replace_file(folder.config, config_to_yaml(config))
        if tokenizer is not None:
            replace_folder(folder.tokenizer, partial(save_tokenizer, tokenizer))

    if not draft.needs_ids:
        config = config.model_copy(update=config.view_settings)
        on_main(accelerator, begin)
        on_main(accelerator, keep)
        return NoTokens(config.seed), config

    if config.tokens is not None:
        stored, config = open_tokens(config, images, draft.grid, accelerator.device)
        if start is not None:
            start.check_ids(stored.tokenizer_hash, stored.vocab_size)
        on_main(accelerator, begin)
        on_main(accelerator, keep)
        return stored, config

    name = config.tokenizer or "pixels"
    config = config.model_copy(
        update={
            "tokenizer": name,
            "vocab_size": settle_vocab_size(name, config.vocab_size, len(images) * draft.patches),
            **config.view_settings,
        }
    )
    if agree(accelerator, bool(on_main(accelerator, begin))):
        return OnlineTokens(load_tokenizer(folder.tokenizer), accelerator.device, config.seed), config
    tokenizer: Tokenizer
    if is_ready(name):
        tokenizer = main_first(accelerator, lambda: ready_tokenizer(name, config, draft.grid))
    else:
        tokenizer = main_first(
            accelerator, lambda: unfitted_tokenizer(name, config, draft.grid, config.image_size, config.channels)
        ).to(accelerator.device)
        dataset = ViewDataset(
            images,
            replace(_train_view(config, tokenizer.input_size), size=0),
            config.channels,
            Draws(config.seed, config.seed),
        )
        tally = DamageTally(images, config.max_damaged)
        fit_codebook(
            tokenizer,
            config,
            dataset,
            tally,
            accelerator,
            seed=config.seed,
            batch_size=64,
            workers=workers,
            console=console,
        )
    if start is not None:
        start.check_ids(tokenizer.content_hash, tokenizer.vocab_size)
    on_main(accelerator, lambda: keep(tokenizer))
    return OnlineTokens(tokenizer, accelerator.device, config.seed), config


def _train_view(config: PretrainConfig, view_size: int) -> TrainView:
    assert config.crop_min is not None
    assert config.flip is not None
    return TrainView(
        config.image_size,
        view_size,
        config.crop_min,
        config.flip,
        config.color_jitter,
        config.input_mean,
        config.input_std,
    )


def _some_ids(source: TokenSource, dataset: ViewDataset, config: PretrainConfig, workers: int) -> Iterator[Tensor]:
    """Yield ids of views of random images, as training sees them."""
    keys = draw_batches(len(dataset), BASELINE_IMAGES, 64, FIT_EPOCH, fold_seed(config.seed, Stream.SAMPLE))
    tally = DamageTally(dataset.images, config.max_damaged)
    for batch in load_batches(dataset, keys, workers):
        tally.add(batch["damaged"])
        yield from source(batch)


def _baseline(
    objective: Objective,
    source: TokenSource,
    dataset: ViewDataset,
    config: PretrainConfig,
    workers: int,
    folder: RunFolder,
) -> Baseline | None:
    if source.vocab_size is None:
        return None
    ids = _some_ids(source, dataset, config, workers)
    return measure_baseline(ids, source.vocab_size, objective.cross_entropy, folder.baseline)


def _describe(record: Record) -> str:
    return f"loss {record['loss']:.4f}"


def _evaluators(config: PretrainConfig, workers: int) -> list[Evaluator]:
    if config.eval_data is None:
        return []
    view = PlainView((config.image_size, config.image_size), config.input_mean, config.input_std)
    parts = open_labelled(config.eval_data, config.seed)
    return [probe_evaluator(*parts, view, channels=config.channels, workers=workers)]


def _plot_start(
    objective: Objective, source: TokenSource, dataset: ViewDataset, config: PretrainConfig, folder: RunFolder
) -> None:
    folder.figures.mkdir(exist_ok=True)
    plot_layout(objective, folder.figures / "layout.png")
    if source.vocab_size is None:
        return
    shown = replace(dataset, view=_train_view(config, source.view_size or config.image_size))
    spread = torch.linspace(0, len(dataset) - 1, min(8, len(dataset))).long().tolist()
    batch = collate([shown[0, index] for index in spread])
    (ids,) = source(batch)
    plot_tokens(batch["tokenizer_images"], ids.cpu(), objective.grid, source.vocab_size, folder.figures / "tokens.png")
