"""One training run on the engine, whatever is trained: resumed exactly, watched, saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from mapet.config.base import config_to_yaml, free_keys, make_config, read_recipe
from mapet.config.keys import TrainKeys
from mapet.data.batches import DamageTally, StepSampler, ViewDataset, load_batches
from mapet.engine.checkpoint import MadeFrom, State, damaged_checkpoint, read_checkpoint, read_state, write_checkpoint
from mapet.engine.files import replace_file, replace_folder
from mapet.engine.lineage import read_origin
from mapet.engine.loop import Evaluator, Plan, Targets, Trainee, train
from mapet.engine.runfolder import RunFolder, explain_disk_errors
from mapet.engine.sinks import JsonLines, Record, Sink, TensorBoard
from mapet.engine.stop import StopRequest
from mapet.errors import MapetError
from mapet.report.progress import ProgressSink

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainKeys)

# Keys whose None is an answer, not "choose for me".
NONE_IS_SAID = frozenset({"layer_scale", "layer_decay", "augment", "ema_decay", "label_share", "labels_per_class"})


@dataclass(frozen=True)
class Job:
    """What differs between one training run and another.

    Attributes:
        config: resolved.
        dataset: gives the batches.
        objective: on its device.
        optimizer: of its parameters; a group's ``lr_scale`` multiplies the learning rate.
        targets: what a batch is trained towards.
        targets_hash: of what makes the targets; a resumed run must have the same.
        product: the folder that holds what came of it, and how it is written.
        describe: puts a record into words.
        evaluators: measure the objective during the run.
        evaluate_every: epochs between that.
        targets_name: what makes the targets, in words.
        save_first: save before the first step, because what the objective begins with may not be had again.
    """

    config: TrainKeys
    dataset: ViewDataset
    objective: nn.Module
    optimizer: Optimizer
    targets: Targets
    targets_hash: str
    product: tuple[Path, Callable[[Path], None]]
    describe: Callable[[Record], str]
    evaluators: Sequence[Evaluator] = ()
    evaluate_every: int = 1
    targets_name: str = "the tokenizer or token store"
    save_first: bool = False


@contextmanager
def run_folder(out: str | Path) -> Iterator[RunFolder]:
    """Give the folder of a run, let go of it at the end, and put the system's refusals into one sentence.

    Raises:
        MapetError: at once if the folder holds other things than a run.
    """
    folder = RunFolder(out)
    with explain_disk_errors(folder.root):
        folder.check()
        try:
            yield folder
        finally:
            folder.close()


def settle_config(config_class: type[Config], values: Mapping[str, Any], folder: RunFolder, resume: bool) -> Config:
    """Validate the values; on resume they complete those the run began with, and may not contradict them."""
    if not (resume and folder.config.exists()):
        return make_config(config_class, dict(values))
    saved = read_recipe(folder.config)
    lacking = [key for key in config_class.model_fields if key not in saved]
    strange = [key for key in saved if key not in config_class.model_fields]
    if lacking and strange:
        raise MapetError(
            f"{folder.root} holds the run of another command, whose configuration has {strange[0]!r}; continue it with "
            "that, or choose another --out"
        )
    if lacking:
        raise MapetError(f"{folder.config} lacks {lacking[0]!r}, so it was cut short or edited; restore it")
    began_with = make_config(config_class, saved, str(folder.config)).model_dump()
    free = free_keys(config_class)
    # "Choose for me" was answered when the run began, but for what may change.
    kept = free - {"data"} | NONE_IS_SAID
    given = {key: value for key, value in values.items() if value not in (None, "auto") or key in kept}
    config = make_config(config_class, {**began_with, **given})
    for key, now in config.model_dump().items():
        if now != began_with[key] and key not in free:
            raise MapetError(
                f"{key!r} is {now!r}, but the run in {folder.root} began with {began_with[key]!r}; a resumed run "
                "must stay the same: drop the change, or start another run with another --out"
            )
    return config


def check_out(data: str, out: str | Path) -> None:
    """Refuse an output folder without a name, or inside the image folder."""
    if not str(out):
        raise MapetError("the name of the output folder is empty; say where with --out FOLDER")
    images = Path(data).resolve()
    if images.is_dir() and Path(out).resolve().is_relative_to(images):
        raise MapetError(
            f"output folder {out} lies inside the image folder {data}, so pictures written to it would count as "
            "images of yours; choose an --out outside of it"
        )


def begin_run(folder: RunFolder, config: TrainKeys, resume: bool) -> None:
    """Open the folder of a run, log into it, and write down what it is made of, unless that stands there."""
    folder.open(resume=resume)
    log_to(folder.log)
    if not folder.config.exists():
        replace_file(folder.config, config_to_yaml(config))


def record_origin(folder: RunFolder, model: str) -> None:
    """Keep what the run says of itself that ``model`` is of: it may be gone by the time somebody asks."""
    if not folder.origin.exists() and (origin := read_origin(model)) is not None:
        replace_file(folder.origin, json.dumps(origin, indent=1) + "\n")


def log_to(file: Path) -> None:
    """Also write the package's log to a file, and to no other file any more."""
    package = logging.getLogger("mapet")
    for handler in [handler for handler in package.handlers if isinstance(handler, logging.FileHandler)]:
        package.removeHandler(handler)
        handler.close()
    # File names need not be valid Unicode.
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)


@dataclass(frozen=True)
class Outcome:
    """How far a run came: optimiser steps done, of how many, and the signal that ended it early, or None."""

    steps: int
    total_steps: int
    stopped_by: int | None


def run_job(job: Job, folder: RunFolder, accelerator: Accelerator, workers: int, console: Console) -> Outcome:
    """Train from the last checkpoint, or the beginning, to the end or a stop request. All processes call it."""
    config, objective, images = job.config, job.objective, job.dataset.images
    main = accelerator.is_main_process
    optimizer = job.optimizer
    made_from = MadeFrom(
        images=len(images),
        fingerprint=images.fingerprint,
        targets=job.targets_hash,
        processes=accelerator.num_processes,
    )
    first_step, damaged = _continue(job, folder, made_from, accelerator)
    plan = _plan(job, len(images), first_step)
    tally = DamageTally(images, config.max_damaged, damaged)
    # The optimizer's state is where it belongs: moved, its step counts would be read back from the device each step.
    prepared, optimizer = accelerator.prepare(objective, optimizer, device_placement=[True, False])
    if main:
        replace_file(folder.config, config_to_yaml(config))
        if folder.metrics.exists():
            folder.forget_metrics_from(first_step)
        elif first_step:
            logger.warning("%s is gone: the curve begins anew at step %d", folder.metrics, first_step)
        logger.info(
            "%s: %d images, steps %d to %d of %d images on %s in precision %s",
            folder.root,
            len(images),
            first_step,
            plan.total_steps,
            config.batch_size,
            accelerator.device,
            config.precision,
        )

    def save(done: int) -> None:
        tally.indices.update(gather_object(sorted(tally.indices)))  # waits for every process
        if main:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            state = State(
                step=done,
                total_steps=plan.total_steps,
                made_from=made_from,
                damaged=sorted(tally.indices),
                scaler=scaler,
            )
            # The product first: where the last checkpoint is, its product is too.
            replace_folder(*job.product)
            replace_folder(folder.checkpoint, lambda fresh: write_checkpoint(fresh, objective, optimizer, state))

    if job.save_first and first_step == 0:
        save(0)
    sampler = StepSampler(
        len(images),
        config.batch_size,
        config.seed,
        first_step,
        plan.total_steps,
        accelerator.process_index,
        accelerator.num_processes,
        config.accumulate,
    )
    batches = iter(load_batches(job.dataset, sampler, workers, pin=accelerator.device.type == "cuda"))
    sinks: list[Sink] = (
        [
            JsonLines(folder.metrics),
            TensorBoard(folder.tensorboard, plan.first_step),
            ProgressSink(console, job.describe, plan.first_step, plan.total_steps),
        ]
        if main
        else []
    )
    trainee = Trainee(config, plan, accelerator, prepared, optimizer, job.targets, tally)
    try:
        with StopRequest() as stop:
            steps = train(trainee, batches, sinks=sinks, evaluators=job.evaluators, save=save, stop=stop)
    finally:
        for sink in sinks:
            sink.close()
    if main and not job.product[0].exists():  # of a finished run, somebody may have moved it away
        replace_folder(*job.product)
    return Outcome(steps, plan.total_steps, stop.signal)


def _continue(job: Job, folder: RunFolder, made_from: MadeFrom, accelerator: Accelerator) -> tuple[int, list[int]]:
    """Load the last checkpoint, if there is one; return the steps done and the images known to be damaged."""
    if not folder.checkpoint.exists():
        return 0, []
    before = read_state(folder.checkpoint).made_from
    if before.fingerprint != made_from.fingerprint:
        raise MapetError(
            f"'data' changed since the run in {folder.root} began: it had {before.images} images, now there are "
            f"{made_from.images}, or some have other names; restore it, or start another run with another --out"
        )
    if before.targets != made_from.targets:
        raise MapetError(
            f"{job.targets_name} is not what the run in {folder.root} began with, so its targets mean something else; "
            "restore it, or start another run with another --out"
        )
    if before.processes != made_from.processes:
        logger.warning(
            "the run began with %d processes and goes on with %d: with the same images in the same order, but other "
            "visiting orders",
            before.processes,
            made_from.processes,
        )
    state = read_checkpoint(folder.checkpoint, job.objective, job.optimizer)
    total = job.config.total_steps(before.images)
    if state.step > total:
        raise damaged_checkpoint(folder.checkpoint, ValueError(f"state.json says step {state.step} of {total}"))
    if accelerator.scaler is not None:
        try:
            accelerator.scaler.load_state_dict(state.scaler or {})
        except (KeyError, RuntimeError) as error:  # it lacks an entry
            raise damaged_checkpoint(folder.checkpoint, error) from error
    return state.step, state.damaged


def _plan(job: Job, images: int, first_step: int) -> Plan:
    config = job.config
    steps_per_epoch = images // config.batch_size
    return Plan(
        first_step=first_step,
        total_steps=config.total_steps(images),
        steps_per_epoch=steps_per_epoch,
        checkpoint_every=config.checkpoint_every or steps_per_epoch,
        evaluate_every=job.evaluate_every * steps_per_epoch,
    )
