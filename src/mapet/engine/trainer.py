"""The trainer: set up, fetch, forward, backward, step, log, measure, save. It knows no objective and no metric."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from mapet.config.base import config_to_yaml
from mapet.config.keys import TrainKeys
from mapet.data.batches import Batch, BatchPart, DamageTally, StepSampler, ViewDataset, load_batches
from mapet.data.seeds import Stream, fold_seed
from mapet.engine.checkpoint import MadeFrom, State, damaged_checkpoint, read_checkpoint, read_state, write_checkpoint
from mapet.engine.files import replace_file, replace_folder
from mapet.engine.finite import find_cause, is_finite
from mapet.engine.kept import LossWatch, keep_checkpoint, kept_checkpoints
from mapet.engine.optimizer import learning_rate
from mapet.engine.parallel import bounded_waits, count_workers, highest, make_accelerator, on_main, product_speed, wrap
from mapet.engine.runfolder import RunFolder
from mapet.engine.sinks import SINKS, Record, Sink
from mapet.engine.stochastic_depth import draw_depth, forget_depth, use_drawn_depth
from mapet.engine.stop import StopRequest
from mapet.errors import MapetError
from mapet.objectives.task import Task

logger = logging.getLogger(__name__)

MOST_SKIPPED = 5  # steps in a row whose gradients are not finite

# Measures the network that comes out of a task: yields names and values.
Evaluator = Callable[[nn.Module], Iterable[tuple[str, float]]]
# Turns a batch into what the task's forward takes, on the device; no gradient goes through it.
Inputs = Callable[[Batch, BatchPart], tuple[Any, ...]]


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        folder: the run folder.
        config: the settled configuration.
        task: as trained; ``task.outcome()`` is the network.
        exported: the folder with what came out.
        steps, total_steps: optimiser steps done, and of the whole run.
        stopped_by: the signal that ended the run early, or None.
        is_main: whether this process is the one that reports, of those that trained together.
        measured: what was measured last, by name.
    """

    folder: RunFolder
    config: Any
    task: Task
    exported: Path
    steps: int
    total_steps: int
    stopped_by: int | None
    is_main: bool
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.steps == self.total_steps

    def __repr__(self) -> str:
        figures = "".join(f", {name} {value:.4g}" for name, value in self.measured.items() if isinstance(value, float))
        return f"<{self.folder.root}: step {self.steps} of {self.total_steps}{figures}; exported to {self.exported}>"


@dataclass
class Trainer:
    """Trains a task from its last checkpoint, or the beginning, to the end or a stop request.

    Attributes:
        config: settled.
        task: on its device.
        optimizer: of the task's parameters; a group's ``lr_scale`` multiplies the learning rate.
        dataset: gives the batches.
        inputs: what the task takes of a batch.
        folder: the run folder, held by this process.
        exported: the folder for what comes out.
        export: writes ``task.outcome()`` into a folder.
        targets_hash: of what makes the targets; a resumed run must have the same.
        progress: shows records on the terminal.
        evaluators: measure ``task.outcome()`` during the run.
        evaluate_every: epochs between that.
        targets_name: what makes the targets, for messages.
        save_first: save before the first step, because what the task begins with may not be had again.
        can_branch: whether the command has ``--branch-of``.
        flops: floating-point operations of one image, forward and backward; the records then have the ``mfu`` (model
            FLOPs utilisation): the share of the devices' speed in matrix products that the run reaches.
    """

    config: TrainKeys
    task: Task
    optimizer: Optimizer
    dataset: ViewDataset
    inputs: Inputs
    folder: RunFolder
    exported: Path
    export: Callable[[nn.Module, Path], None]
    targets_hash: str
    progress: Sink
    evaluators: Sequence[Evaluator] = ()
    evaluate_every: int = 1
    targets_name: str = "the tokenizer or token store"
    save_first: bool = False
    can_branch: bool = False
    flops: float | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the images."""
        return len(self.dataset) // self.config.batch_size

    def run(self) -> Result:
        """Train; all processes call it."""
        config, folder = self.config, self.folder
        self.accelerator = make_accelerator(config.precision, config.accumulate)
        self.is_main = self.accelerator.is_main_process
        # A resumed run may have another number of processes.
        config.choose_batch(config.model_dump(), len(self.dataset), self.accelerator.num_processes)
        self.tally = DamageTally(self.dataset.images, config.max_damaged)
        self.losses, self.skipped = LossWatch(), 0
        first = self._restore()
        self.ceiling = product_speed(self.accelerator.device, config.precision) if self.flops else 0.0
        self.depth = use_drawn_depth(self.task)
        self.wrapped, self.optimizer = wrap(self.accelerator, self.task, self.optimizer, compiled=config.compile)
        if self.is_main:
            self._begin_folder(first)
        if self.save_first and first == 0:
            self._save(0)
        stop = StopRequest()
        batches = self._batches(first, stop)
        done, stopped_by, measured = first, None, dict[str, float]()
        with ExitStack() as opened:
            sinks = [*(make() for make in SINKS.values()), self.progress] if self.is_main else []
            for sink in sinks:
                sink.begin(folder, first, config.steps)
                opened.enter_context(closing(sink))
            opened.enter_context(stop)
            opened.callback(forget_depth, self.depth)
            self.wrapped.train()
            for step in range(first, config.steps):
                with bounded_waits():
                    record = self._step(step, batches)
                    self.task.after_step(step, config.steps)
                    stopped_by = highest(stop.signal or 0) or None
                done = step + 1
                last = done == config.steps or stopped_by is not None
                fresh = {}
                if done % (self.evaluate_every * self.steps_per_epoch) == 0 or done == config.steps:
                    fresh = self._measure(done)
                if step % config.log_every == 0 or fresh or last:
                    for sink in sinks:
                        sink.write(record | fresh)
                if done % config.checkpoint_every == 0 or last:
                    self._save(done)
                measured = fresh or measured
                if last:
                    break
        if self.is_main and not self.exported.exists():  # a user may have moved that of a finished run away
            self._export()
        self.accelerator.wait_for_everyone()
        return Result(folder, config, self.task, self.exported, done, config.steps, stopped_by, self.is_main, measured)

    def _step(self, step: int, batches: Iterator[Batch]) -> Record:
        """Take one optimiser step and return its record."""
        config, accelerator = self.config, self.accelerator
        # Seeds dropout and what else draws in the forward pass. Images, crops, masks and stochastic depth have seeds of
        # their own (StepSampler, Draws, BatchPart). No random state lives longer than a step: any step can be resumed.
        torch.manual_seed(fold_seed(config.seed, Stream.STEP, step, accelerator.process_index))
        lr = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # timm's name, for layer-wise decay

        began, waited = time.perf_counter(), 0.0
        sums: dict[str, Tensor] = {}
        grad_norm, measured = 0.0, dict[str, float]()
        for micro_batch in range(config.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.tally.add(batch["damaged"])
            part = self.sampler.part(step, micro_batch)
            inputs = self.inputs(batch, part)
            draw_depth(self.depth, part, accelerator.device)
            with accelerator.accumulate(self.wrapped):
                output = self.wrapped(*inputs)
                for name, value in output.items():
                    if value.ndim == 0:
                        sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulate
                accelerator.backward(output["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip_grad)
                    means = accelerator.reduce(torch.stack([*sums.values(), norm.float()]), "mean")
                    *values, grad_norm = means.tolist()  # one wait for the device, not one for each
                    measured = dict(zip(sums, values, strict=True))
                    loss = measured["loss"]
                    if math.isfinite(loss):
                        self.losses.add(loss)
                    if is_finite(loss, grad_norm, config.precision):
                        self.skipped = 0
                    else:
                        with accelerator.autocast():
                            cause = find_cause(self.task, inputs, loss, batch, self.dataset.images)
                        self._skip(step, f"loss {loss:g}, gradient norm {grad_norm:g} at rate {lr:.3g}: {cause}")
                if not self.skipped or accelerator.scaler is not None:  # fp16's scaler skips the step by itself
                    self.optimizer.step()
                self.optimizer.zero_grad()
        images_per_s = config.batch_size / (seconds := time.perf_counter() - began)
        ceiling = self.ceiling * accelerator.num_processes
        return {
            "step": step,
            "epoch": (step + 1) / self.steps_per_epoch,
            "images": (step + 1) * config.batch_size,
            **measured,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # of a step that was skipped
            "images_per_s": images_per_s,
            "data_wait": waited / seconds,
            **({"mfu": images_per_s * self.flops / ceiling} if self.flops else {}),
            "damaged": len(self.tally.indices),
        }

    def _skip(self, step: int, cause: str) -> None:
        """Take no step because its gradient is not finite; stop the run if it has diverged."""
        self.skipped += 1
        config, folder = self.config, self.folder
        if self.skipped < MOST_SKIPPED and not self.losses.has_risen():
            logger.warning("%s: step %d is skipped: %s, precision %s", folder.root, step, cause, config.precision)
            return
        first = step + 1 - self.skipped
        self._save(first)
        raise MapetError(
            f"step {step}: {cause}, precision {config.precision!r}. No weight was changed since step {first}, from "
            "where --resume repeats this; start another run with a lower --lr, a longer --warmup or --precision no"
            f"{self._kept()}"
        )

    def _kept(self) -> str:
        """Return in words from which earlier checkpoint one can go on."""
        kept = list(kept_checkpoints(self.folder.checkpoint.parent))
        if not kept or not self.can_branch:
            return ""
        return f"; --branch-of {self.folder.root} --lr {self.config.lr / 3:.2g} goes on from step {kept[-1]}"

    def _measure(self, done: int) -> dict[str, float]:
        """Return what the evaluators yield, on the main process, with the task in evaluation mode."""

        def work() -> dict[str, float]:
            self.task.eval()
            try:
                with torch.no_grad():
                    network = self.task.outcome()
                    return {name: value for evaluator in self.evaluators for name, value in evaluator(network)}
            finally:
                self.task.train()

        try:
            return on_main(work) or {}
        except Exception:
            self._save(done)  # a failed measurement must not lose what was learned
            raise

    def _save(self, done: int) -> None:
        """Store the state after so many steps; all processes call it."""
        self.tally.indices.update(gather_object(sorted(self.tally.indices)))
        if not self.is_main:
            return
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        has_risen, damaged = self.losses.has_risen(), sorted(self.tally.indices)
        state = State(done, self.config.steps, self._made_from(), damaged, scaler, lowest_loss=self.losses.lowest)
        # The export comes first, so that no checkpoint lacks its export.
        self._export()
        last = self.folder.checkpoint
        replace_folder(last, lambda fresh: write_checkpoint(fresh, self.task, self.optimizer, state))
        if not has_risen and not self.skipped:
            keep_checkpoint(last, done, self.config.keep)
        elif has_risen:
            logger.warning("%s: %s%s", self.folder.root, self.losses, self._kept())

    def _export(self) -> None:
        replace_folder(self.exported, lambda fresh: self.export(self.task.outcome(), fresh))

    def _batches(self, first: int, stop: StopRequest) -> Iterator[Batch]:
        config, device = self.config, self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.sampler = StepSampler(
            len(self.dataset), config.batch_size, config.seed, first, config.steps, rank, world, config.accumulate
        )
        workers = count_workers(config.workers, self.dataset.images, device)
        return load_batches(self.dataset, self.sampler, workers, device, stop.insist)

    def _begin_folder(self, first: int) -> None:
        """Write down the configuration, whose free keys may have changed, and log what begins."""
        config, root = self.config, self.folder.root
        replace_file(self.folder.config, config_to_yaml(config))
        steps = f"steps {first} to {config.steps} of {config.batch_size} images"
        place = f"on {self.accelerator.device} in precision {config.precision}"
        logger.info("%s: %d images, %s %s", root, len(self.dataset), steps, place)

    def _made_from(self) -> MadeFrom:
        images = self.dataset.images
        return MadeFrom(len(images), images.fingerprint, self.targets_hash, self.accelerator.num_processes)

    def _restore(self) -> int:
        """Load the last checkpoint, if there is one; return the steps done."""
        folder, now = self.folder, self._made_from()
        if not folder.checkpoint.exists():
            return 0
        before = read_state(folder.checkpoint).made_from
        if before.fingerprint != now.fingerprint:
            raise MapetError(
                f"'data' changed since the run in {folder.root} began: it had {before.images} images, now there are "
                f"{now.images}, or some have other names; restore it, or start another run with another --out"
            )
        if before.targets != now.targets:
            raise MapetError(
                f"{self.targets_name} is not what the run in {folder.root} began with, so its targets mean something "
                "else; restore it, or start another run with another --out"
            )
        if before.processes != now.processes:
            change = f"the run began with {before.processes} processes and goes on with {now.processes}"
            logger.info("%s: everything stays the same but dropout and mixup, which each process draws", change)
        state = read_checkpoint(folder.checkpoint, self.task, self.optimizer)
        if state.total_steps != self.config.steps:
            reason = ValueError(f"it is of {state.total_steps} steps, the run of {self.config.steps}")
            raise damaged_checkpoint(folder.checkpoint, reason)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.tally.indices.update(state.damaged)
        self.losses = LossWatch(state.lowest_loss)
        return state.step
