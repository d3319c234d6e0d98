"""Pre-training, from values to a run folder."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mapet.config.base import continued, parse, read_recipe
from mapet.config.keys import numbers
from mapet.data.batches import Batch, BatchPart, DamageTally, ViewDataset, draw_batches, load_batches, sent
from mapet.data.given import given_images
from mapet.data.open import open_images, open_labelled
from mapet.data.reading import Reading
from mapet.data.seeds import Draws, Stream, fold_seed
from mapet.data.sources import ImageSet
from mapet.data.views import PlainView, TrainView
from mapet.engine.files import replace_folder
from mapet.engine.lineage import record_origin
from mapet.engine.measuring import with_measured
from mapet.engine.optimizer import build_optimizer
from mapet.engine.parallel import agree, count_workers, join_processes, main_first, on_main
from mapet.engine.runfolder import RunFolder, check_out, run_folder
from mapet.engine.sinks import Record
from mapet.engine.trainer import Evaluator, Result, Trainer
from mapet.jobs.pretrain.branch import begin_branch
from mapet.jobs.pretrain.config import PretrainConfig, input_of
from mapet.jobs.pretrain.flops import count_flops
from mapet.jobs.pretrain.settle import initial_backbone, settle_run
from mapet.jobs.pretrain.start import load_weights, read_weights
from mapet.models.export import export_network
from mapet.objectives.base import Objective
from mapet.objectives.masking import Mask
from mapet.objectives.registry import build_objective, build_target
from mapet.probes.rows import probe_evaluator
from mapet.report.figures import plot_curve, plot_layout, plot_tokens
from mapet.report.progress import Baseline, ProgressSink
from mapet.targets.baseline import BASELINE_IMAGES, measure_baseline
from mapet.targets.fitting import FIT_EPOCH, fit_codebook
from mapet.targets.sources import NoSource, OnlineIds, StoredIds, TargetSource, TeacherFeatures
from mapet.targets.tokenizer import is_ready, ready_tokenizer, unfitted_tokenizer
from mapet.tokenizers.base import Grid
from mapet.tokenizers.files import load_tokenizer, save_tokenizer
from mapet.tokenizers.teachers import build_teacher
from mapet.tokenstore.store import TokenStore

logger = logging.getLogger(__name__)


def pretrain(
    values: Mapping[str, Any],
    out: str | Path,
    *,
    resume: bool = False,
    branch_of: str | Path | None = None,
    from_step: int | None = None,
    console: Console | None = None,
) -> Result:
    """Pre-train a ViT on unlabelled images.

    Args:
        values: configuration by key, see ``PretrainConfig``; ``data`` is needed, a name (see
            docs/data.md) or a map-style ``torch.utils.data.Dataset``, which must be given again to resume.
        out: the run folder.
        resume: continue the run in ``out`` exactly, or begin it if there is none.
        branch_of: another run, with one of whose checkpoints this one begins; see ``begin_branch``.
        from_step: the step of that checkpoint; None for the newest that was kept.
        console: where progress is shown; None for standard error.

    Returns:
        the result; ``result.task`` is the objective, its ``backbone`` a timm model.

    Raises:
        MapetError: for input that cannot work; nothing is lost or half-written.
    """
    with run_folder(out) as folder:
        world = join_processes()
        values, dataset = given_images(values)
        if branch_of is not None and not (resume and agree(folder.config.exists())):
            on_main(lambda: begin_branch(branch_of, from_step, values, folder))
            resume = True
        if resume and folder.config.exists():
            config = continued(PretrainConfig, read_recipe(folder.config), values, folder.root)
            images = dataset or main_first(lambda: open_images(config.data))
        else:
            given = parse(PretrainConfig, values, complete=True)
            images = dataset or main_first(lambda: open_images(given["data"]))
            config = main_first(lambda: settle_run(given, len(images), world.num_processes))
            config = with_measured(config, images)
        check_out(config.data, folder.root)
        return _train(config, images, folder, resume, console or Console(stderr=True))


def _train(config: PretrainConfig, images: ImageSet, folder: RunFolder, resume: bool, console: Console) -> Result:
    device = torch.device(join_processes().device)
    workers = count_workers(config.workers, images, device)
    evaluators = _evaluators(config, workers)
    backbone = initial_backbone(config)
    begins_with_init = config.init is not None and not agree(folder.holds_checkpoint())
    if begins_with_init:
        load_weights(backbone, main_first(lambda: read_weights(config)), config)
    on_main(lambda: folder.open(resume=resume))
    source = _open_source(config, images, backbone.patch_embed.grid_size, folder, device, workers, console)
    view = _train_view(config, source.view_size)
    draws = Draws(source.view_seed, config.seed, config.views, config.mirror)
    dataset = ViewDataset(images, view, Reading.of(config), draws, digests=source.needs_digests)

    torch.manual_seed(fold_seed(config.seed, Stream.HEAD))
    target = build_target(config.objective, config.targets, backbone, source.width, config.feature_loss)
    objective = build_objective(
        config.objective, backbone, target, config.mask_ratio, config.masking, config.objective_args
    )
    objective.to(device)
    on_main(lambda: _write_start(config, source, folder))
    baseline = on_main(lambda: _baseline(objective, source, dataset, config, workers, folder))
    on_main(lambda: _plot_start(objective, source, dataset, config, folder))

    def inputs(batch: Batch, part: BatchPart) -> tuple[Any, ...]:
        """Return images, target values and mask.

        The mask is no part of a compiled step. It is drawn on the CPU: a GPU would be waited for in each round of a
        block-wise masking, and would draw other numbers.
        """
        (values,) = source(batch) or (None,)
        drawn = objective.draw_mask(part.total, torch.device("cpu"), part.generator)
        return batch["images"], values, Mask(*(sent(numbers[part.rows], device) for numbers in drawn))

    trainer = Trainer(
        config=config,
        task=objective,
        optimizer=build_optimizer(objective, config),
        dataset=dataset,
        inputs=inputs,
        folder=folder,
        exported=folder.exported,
        export=partial(export_network, **input_of(config), tag=config.objective),
        targets_hash=source.content_hash,
        progress=ProgressSink(console, baseline.describe if baseline else _describe),
        evaluators=evaluators,
        evaluate_every=config.eval_every,
        targets_name="the teacher" if config.targets == "features" else "the tokenizer or token store",
        save_first=begins_with_init,
        can_branch=True,
        flops=None if device.type == "cpu" else count_flops(config, source.width),
    )
    result = trainer.run()
    if result.is_main:
        plot_curve(folder.some_metrics(), baseline, folder.figures / "curve.png")
    return result


def _open_source(
    config: PretrainConfig,
    images: ImageSet,
    grid: Grid,
    folder: RunFolder,
    device: torch.device,
    workers: int,
    console: Console,
) -> TargetSource:
    """Return where the targets come from; a tokenizer that is not yet fitted is fitted."""
    if config.targets not in ("ids", "features"):
        return NoSource(config.seed)
    if config.targets == "features":
        teacher = main_first(lambda: build_teacher(str(config.teacher), config.teacher_stage, config.teacher_weights))
        teacher.check_channels(config.channels)
        return TeacherFeatures(teacher.to(device), config.teacher_size or config.image_size, grid, config.seed)
    if config.tokens is not None:
        return StoredIds(TokenStore(config.tokens), images, device)
    if agree(folder.tokenizer.exists()):
        return OnlineIds(load_tokenizer(folder.tokenizer), device, config.seed)
    name = str(config.tokenizer)
    if is_ready(name):
        tokenizer = main_first(lambda: ready_tokenizer(name, config, grid))
    else:
        fitted = main_first(lambda: unfitted_tokenizer(name, config, grid, config.image_size, config.channels))
        view = replace(_train_view(config, fitted.input_size), size=0)
        dataset = ViewDataset(images, view, Reading.of(config), Draws(config.seed, config.seed))
        tokenizer = fitted.to(device)
        fit_codebook(
            fitted,
            config,
            dataset,
            DamageTally(images, config.max_damaged),
            batch_size=64,
            workers=workers,
            console=console,
        )
    return OnlineIds(tokenizer, device, config.seed)


def _write_start(config: PretrainConfig, source: TargetSource, folder: RunFolder) -> None:
    """Write what the run begins with; before this, nothing in the folder tells that there is a run."""
    folder.write_config(config)
    if config.init is not None:
        record_origin(folder, config.init)
    if isinstance(source, OnlineIds) and not folder.tokenizer.exists():
        replace_folder(folder.tokenizer, partial(save_tokenizer, source.tokenizer))


def _train_view(config: PretrainConfig, view_size: int) -> TrainView:
    mean, std = numbers(config.mean), numbers(config.std)
    return TrainView(config.image_size, view_size, config.crop_min, config.flip, config.color_jitter, mean, std)


def _some_values(source: TargetSource, dataset: ViewDataset, config: PretrainConfig, workers: int) -> Iterator[Tensor]:
    """Yield target values of views of random images, as training sees them."""
    keys = draw_batches(len(dataset), BASELINE_IMAGES, 64, FIT_EPOCH, fold_seed(config.seed, Stream.SAMPLE))
    tally = DamageTally(dataset.images, config.max_damaged)
    for batch in load_batches(dataset, keys, workers):
        tally.add(batch["damaged"])
        yield from source(batch)


def _baseline(
    objective: Objective,
    source: TargetSource,
    dataset: ViewDataset,
    config: PretrainConfig,
    workers: int,
    folder: RunFolder,
) -> Baseline | None:
    if isinstance(source, NoSource):
        return None
    values = _some_values(source, dataset, config, workers)
    vocab_size = source.width if config.targets == "ids" else None
    return measure_baseline(values, vocab_size, objective.target_loss, folder.baseline)


def _describe(record: Record) -> str:
    return f"loss {record['loss']:.4f}"


def _evaluators(config: PretrainConfig, workers: int) -> list[Evaluator]:
    if config.eval_data is None:
        return []
    view = PlainView((config.image_size, config.image_size), numbers(config.mean), numbers(config.std))
    parts = open_labelled(config.eval_data, config.seed)
    return [probe_evaluator(*parts, view, reading=Reading.of(config), workers=workers)]


def _plot_start(
    objective: Objective, source: TargetSource, dataset: ViewDataset, config: PretrainConfig, folder: RunFolder
) -> None:
    folder.figures.mkdir(exist_ok=True)
    plot_layout(objective, folder.figures / "layout.png")
    if config.targets != "ids":
        return
    shown = replace(dataset, view=_train_view(config, source.view_size or config.image_size))
    spread = torch.linspace(0, len(dataset) - 1, min(8, len(dataset))).long().tolist()
    batch = next(load_batches(shown, [[(0, index) for index in spread]], workers=0))
    (ids,) = source(batch)
    images = batch["tokenizer_images"]
    plot_tokens(images, ids.cpu(), objective.grid, source.width, folder.figures / "tokens.png")
