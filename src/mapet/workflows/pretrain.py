"""Pre-training, from values to a run folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch.optim import Optimizer

from mapet.config import PretrainConfig, config_to_yaml, free_keys, make_config, read_recipe
from mapet.data import (
    DamageTally,
    ImageSet,
    PlainView,
    StepSampler,
    Stream,
    TrainView,
    ViewDataset,
    check_channels,
    fold_seed,
    load_batches,
    open_images,
    open_labelled,
)
from mapet.engine import (
    Evaluator,
    JsonLines,
    Plan,
    RunFolder,
    Sink,
    StopRequest,
    TensorBoard,
    Trainee,
    build_optimizer,
    explain_disk_errors,
    read_checkpoint,
    read_state,
    replace_file,
    replace_folder,
    train,
    write_checkpoint,
)
from mapet.errors import MapetError
from mapet.evaluate import probe_evaluator
from mapet.export import export_backbone
from mapet.models import build_vit
from mapet.objectives import LayoutObjective, build_objective
from mapet.report import Baseline, ProgressSink, draw_curve, draw_layout, draw_tokens
from mapet.tokenizers import KTokenizer, load_tokenizer, save_tokenizer
from mapet.workflows.device import count_workers, make_accelerator
from mapet.workflows.tokens import make_tokenizer, measure_baseline, settle_vocab_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: the run folder.
        config: the resolved configuration.
        objective: the trained objective; ``objective.backbone`` is the timm model.
        baseline: what can be had without looking at the image.
        steps: optimiser steps done.
        total_steps: optimiser steps of the whole run.
        stopped_by: the signal that ended it early, or None.
        is_main: whether this process is the one that reports, of those that trained together.
    """

    folder: RunFolder
    config: PretrainConfig
    objective: LayoutObjective
    baseline: Baseline
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
    folder = RunFolder(out)
    config = _settle_config(values, folder, resume)
    with explain_disk_errors(folder.root):
        try:
            return _run(config, folder, resume, console or Console(stderr=True))
        finally:
            folder.close()


def _settle_config(values: Mapping[str, Any], folder: RunFolder, resume: bool) -> PretrainConfig:
    """Validate the values; on resume they complete those the run began with, and may not contradict them."""
    if not (resume and folder.config.exists()):
        return make_config(dict(values))
    saved = read_recipe(folder.config)
    lacking = [key for key in PretrainConfig.model_fields if key not in saved]
    if lacking:
        raise MapetError(f"{folder.config} lacks {lacking[0]!r}, so it was cut short or edited; restore it")
    began_with = make_config(saved, str(folder.config)).model_dump()
    # "Choose for me" was answered when the run began, but for what may change.
    kept = free_keys() - {"data"} | {"layer_scale"}
    given = {key: value for key, value in values.items() if value not in (None, "auto") or key in kept}
    config = make_config({**began_with, **given})
    for key, now in config.model_dump().items():
        if now != began_with[key] and key not in free_keys():
            raise MapetError(
                f"{key!r} is {now!r}, but the run in {folder.root} began with {began_with[key]!r}; a resumed run "
                "must stay the same: drop the change, or start another run with another --out"
            )
    return config


def _run(config: PretrainConfig, folder: RunFolder, resume: bool, console: Console) -> RunResult:
    check_channels(config.channels)
    accelerator = make_accelerator(config)
    _check_processes(config, accelerator)
    device, main = accelerator.device, accelerator.is_main_process
    with accelerator.main_process_first():  # what has to be downloaded is downloaded once
        images = open_images(config.data)
    _check_apart(config, folder)
    workers = count_workers(config, images, device)
    evaluators = _evaluators(config, workers)

    # Built once without a tokenizer: what cannot work is refused before anything is fitted or written.
    config = config.resolve(len(images))
    build = partial(build_objective, config.objective, initial_backbone(config))
    draft = build(vocab_size=2, context_tokens=config.context_tokens, order=config.order)
    config = config.model_copy(
        update={
            "patch_size": config.image_size // draft.grid[0],
            "context_tokens": draft.context_tokens,
            "order": draft.order,
            "vocab_size": settle_vocab_size(config, len(images) * draft.patches),
            "precision": accelerator.mixed_precision,
        }
    )
    view = TrainView(
        config.image_size, config.crop_min, config.flip, config.color_jitter, config.input_mean, config.input_std
    )

    with accelerator.main_process_first():
        if main:
            folder.open(resume=resume)
            _log_to(folder)
        if not folder.tokenizer.exists():
            tokenizer = make_tokenizer(config, draft.grid, images, view, device, workers)
            replace_file(folder.config, config_to_yaml(config))
            replace_folder(folder.tokenizer, partial(save_tokenizer, tokenizer))
        tokenizer = load_tokenizer(folder.tokenizer).to(device)
        baseline = measure_baseline(tokenizer, config, images, view, folder.baseline, device, workers)

    torch.manual_seed(fold_seed(config.seed, Stream.HEAD))
    objective = build(tokenizer.vocab_size, config.context_tokens, config.order).to(device)
    optimizer = build_optimizer(objective, config.peak_lr, config.weight_decay, config.beta2)
    made_from = {
        "images": len(images),
        "fingerprint": images.fingerprint,
        "tokenizer": tokenizer.content_hash,
        "processes": accelerator.num_processes,
    }
    first_step, damaged = _continue(folder, made_from, objective, optimizer, accelerator)
    plan = _plan(config, len(images), first_step)
    tally = DamageTally(images, config.max_damaged, damaged)
    # The optimizer's state is where it belongs: moved, its step counts would be read back from the device each step.
    prepared, optimizer = accelerator.prepare(objective, optimizer, device_placement=[True, False])

    if main:
        replace_file(folder.config, config_to_yaml(config))
        _draw_start(objective, tokenizer, images, view, config, folder)
        if folder.metrics.exists():
            folder.forget_metrics_from(first_step)
        elif first_step:
            logger.warning("%s is gone: the curve begins anew at step %d", folder.metrics, first_step)
        logger.info(
            "%s: %d images, %s, %s, steps %d to %d of %d images on %s in precision %s",
            folder.root, len(images), config.model, config.objective, first_step, plan.total_steps,
            config.batch_size, device, config.precision,
        )  # fmt: skip

    def save(done: int) -> None:
        tally.indices.update(gather_object(sorted(tally.indices)))  # waits for every process
        if main:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            state = {"step": done, "made_from": made_from, "damaged": sorted(tally.indices), "scaler": scaler}
            # The export first: where the last checkpoint is, its export is too.
            replace_folder(
                folder.exported,
                lambda fresh: export_backbone(objective.backbone, fresh, config.input_mean, config.input_std),
            )
            replace_folder(folder.checkpoint, lambda fresh: write_checkpoint(fresh, objective, optimizer, state))

    sampler = StepSampler(
        len(images), config.batch_size, config.seed, first_step, plan.total_steps,
        accelerator.process_index, accelerator.num_processes, config.accumulate,
    )  # fmt: skip
    dataset = ViewDataset(images, view, config.channels, config.seed)
    batches = iter(load_batches(dataset, sampler, workers, pin=device.type == "cuda"))
    sinks = _sinks(folder, console, baseline, plan) if main else []
    trainee = Trainee(config, plan, accelerator, prepared, optimizer, tokenizer, tally)
    try:
        with StopRequest() as stop:
            steps = train(trainee, batches, sinks=sinks, evaluators=evaluators, save=save, stop=stop)
    finally:
        for sink in sinks:
            sink.close()
    if main:
        draw_curve(list(folder.metric_lines()), baseline, folder.figures / "curve.png")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # leaves the process group; else the first to exit aborts the others
    return RunResult(folder, config, objective, baseline, steps, plan.total_steps, stop.signal, main)


def initial_backbone(config: PretrainConfig) -> VisionTransformer:
    """Return the untrained backbone that a run with this configuration begins with."""
    torch.manual_seed(fold_seed(config.seed, Stream.WEIGHTS))
    return build_vit(
        config.model, image_size=config.image_size, patch_size=config.patch_size, channels=config.channels,
        drop_path=config.drop_path, layer_scale=config.layer_scale, **config.model_args,
    )  # fmt: skip


def _check_apart(config: PretrainConfig, folder: RunFolder) -> None:
    data, out = Path(config.data).resolve(), folder.root.resolve()
    if data.is_dir() and out.is_relative_to(data):
        raise MapetError(
            f"output folder {folder.root} lies inside the image folder {config.data}, so the pictures drawn in it "
            "would count as images of yours; choose an --out outside of it"
        )


def _check_processes(config: PretrainConfig, accelerator: Accelerator) -> None:
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise MapetError(
            f"batch size {config.batch_size} cannot be divided among {accelerator.num_processes} processes with "
            f"{config.accumulate} micro-batches each; take a multiple of {parts}"
        )


def _continue(
    folder: RunFolder,
    made_from: Mapping[str, Any],
    objective: LayoutObjective,
    optimizer: Optimizer,
    accelerator: Accelerator,
) -> tuple[int, list[int]]:
    """Load the last checkpoint, if there is one; return the steps done and the images known to be damaged."""
    if not folder.checkpoint.exists():
        return 0, []
    before = read_state(folder.checkpoint)["made_from"]
    if before["fingerprint"] != made_from["fingerprint"]:
        raise MapetError(
            f"'data' changed since the run in {folder.root} began: it had {before['images']} images, now there are "
            f"{made_from['images']}, or some have other names; restore it, or start another run with another --out"
        )
    if before["tokenizer"] != made_from["tokenizer"]:
        raise MapetError(
            f"{folder.tokenizer} is not the tokenizer that the run in {folder.root} began with, so its ids mean "
            "something else; restore it, or start another run with another --out"
        )
    if before["processes"] != made_from["processes"]:
        logger.warning(
            "the run began with %d processes and goes on with %d: with the same images in the same order, but other "
            "visiting orders",
            before["processes"], made_from["processes"],
        )  # fmt: skip
    state = read_checkpoint(folder.checkpoint, objective, optimizer)
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"], state["damaged"]


def _plan(config: PretrainConfig, images: int, first_step: int) -> Plan:
    steps_per_epoch = images // config.batch_size
    return Plan(
        first_step=first_step,
        total_steps=config.total_steps(images),
        steps_per_epoch=steps_per_epoch,
        checkpoint_every=config.checkpoint_every or steps_per_epoch,
        evaluate_every=config.eval_every * steps_per_epoch,
    )


def _evaluators(config: PretrainConfig, workers: int) -> list[Evaluator]:
    if config.eval_data is None:
        return []
    view = PlainView(config.image_size, config.input_mean, config.input_std)
    parts = open_labelled(config.eval_data, config.seed)
    return [probe_evaluator(*parts, view, channels=config.channels, workers=workers)]


def _sinks(folder: RunFolder, console: Console, baseline: Baseline, plan: Plan) -> list[Sink]:
    return [
        JsonLines(folder.metrics),
        TensorBoard(folder.tensorboard, plan.first_step),
        ProgressSink(console, baseline, plan.first_step, plan.total_steps),
    ]


def _draw_start(
    objective: LayoutObjective,
    tokenizer: KTokenizer,
    images: ImageSet,
    view: TrainView,
    config: PretrainConfig,
    folder: RunFolder,
) -> None:
    folder.figures.mkdir(exist_ok=True)
    draw_layout(objective, folder.figures / "layout.png")
    dataset = ViewDataset(images, view, config.channels, config.seed)
    spread = torch.linspace(0, len(images) - 1, min(8, len(images))).long().tolist()
    views = torch.stack([dataset[0, index]["view"] for index in spread])
    ids = tokenizer.encode(views.to(tokenizer.centroids.device)).cpu()
    draw_tokens(views, ids, tokenizer.grid, tokenizer.vocab_size, folder.figures / "tokens.png")


def _log_to(folder: RunFolder) -> None:
    package = logging.getLogger("mapet")
    for handler in [handler for handler in package.handlers if isinstance(handler, logging.FileHandler)]:
        package.removeHandler(handler)
        handler.close()
    # File names need not be valid Unicode.
    handler = logging.FileHandler(folder.log, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)
