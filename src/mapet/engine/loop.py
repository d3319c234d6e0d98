"""The training loop: fetch, forward, backward, step, log, save. It knows no objective, metric or data set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from mapet.config.keys import TrainKeys
from mapet.data.batches import Batch, DamageTally
from mapet.data.seeds import Stream, fold_seed
from mapet.engine.finite import check_finite
from mapet.engine.schedule import warmup_cosine
from mapet.engine.sinks import Record, Sink
from mapet.engine.stop import StopRequest
from mapet.errors import MapetError

Result = TypeVar("Result")
Evaluator = Callable[[nn.Module], Iterable[tuple[str, float]]]
# What a batch is to be trained towards, on the device: whatever the objective takes beside the images, if anything.
Targets = Callable[[Batch], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Plan:
    """The numbers of optimiser steps that a run is made of."""

    first_step: int
    total_steps: int
    steps_per_epoch: int
    checkpoint_every: int
    evaluate_every: int


@dataclass(frozen=True)
class Trainee:
    """What takes an optimiser step: the objective, prepared by Accelerate, and what feeds it."""

    config: TrainKeys
    plan: Plan
    accelerator: Accelerator
    objective: nn.Module
    optimizer: Optimizer
    targets: Targets
    tally: DamageTally

    def learning_rate(self, step: int) -> float:
        """The schedule, a pure function of the step."""
        peak = self.config.peak_lr
        return warmup_cosine(
            step,
            total=self.plan.total_steps,
            warmup=round(self.config.warmup * self.plan.total_steps),
            start=min(self.config.warmup_lr, peak),
            peak=peak,
            end=min(self.config.min_lr, peak),
        )

    def optimise(self, step: int, batches: Iterator[Batch]) -> Record:
        """Take one optimiser step and return what there is to know about it."""
        config, accelerator = self.config, self.accelerator
        # All randomness of a step comes from here, so a run can be taken up at any step.
        torch.manual_seed(fold_seed(config.seed, Stream.STEP, step, accelerator.process_index))
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # timm's name, for layer-wise decay

        began, waited = time.perf_counter(), 0.0
        sums: dict[str, Tensor] = {}
        grad_norm = 0.0
        for _ in range(config.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.tally.add(batch["damaged"])
            student = batch["images"].to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(self.objective):
                output = self.objective(student, *self.targets(batch))
                for name, value in output.items():
                    if value.ndim == 0:
                        sums[name] = sums.get(name, 0) + value.detach().float() / config.accumulate
                accelerator.backward(output["loss"])
                if accelerator.sync_gradients:
                    grad_norm = float(accelerator.clip_grad_norm_(self.objective.parameters(), config.clip_grad))
                    means = accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
                    measured = dict(zip(sums, means, strict=True))
                    check_finite(
                        step=step,
                        loss=measured["loss"],
                        grad_norm=grad_norm,
                        lr=lr,
                        precision=accelerator.mixed_precision,
                        inputs=student,
                        objective=self.objective,
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        return {
            "step": step,
            "epoch": (step + 1) / self.plan.steps_per_epoch,
            "images": (step + 1) * config.batch_size,
            **measured,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # fp16's scaler skips such steps
            "images_per_s": config.batch_size / seconds,
            "data_wait": waited / seconds,
            "damaged": len(self.tally.indices),
        }


def train(
    trainee: Trainee,
    batches: Iterator[Batch],
    *,
    sinks: Sequence[Sink],
    evaluators: Sequence[Evaluator],
    save: Callable[[int], None],
    stop: StopRequest,
) -> int:
    """Run to the end of the plan or to a stop request; return how many steps are done.

    Args:
        trainee: what learns.
        batches: micro-batches from ``plan.first_step`` on.
        sinks: take the records.
        evaluators: measure the objective every ``plan.evaluate_every`` steps and at the end.
        save: stores the state after that many steps; called on every process.
        stop: asks for an early end, which is saved like any other.
    """
    plan, accelerator = trainee.plan, trainee.accelerator
    trainee.objective.train()
    for step in range(plan.first_step, plan.total_steps):
        record = trainee.optimise(step, batches)
        done = step + 1
        last = done == plan.total_steps or agree(accelerator, stop.requested)

        measured: dict[str, float] = {}
        if done % plan.evaluate_every == 0 or done == plan.total_steps:
            try:
                measured = evaluate(evaluators, accelerator, trainee.objective)
            except Exception:
                save(done)  # what was learned is not to be lost for a measurement
                raise
        if step % trainee.config.log_every == 0 or measured or last:
            for sink in sinks:
                sink.write(record | measured)
        if done % plan.checkpoint_every == 0 or last:
            save(done)
        if last:
            return done
    return plan.total_steps


def agree(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process wishes it, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return wish
    return bool(accelerator.reduce(torch.tensor(float(wish), device=accelerator.device), "sum") > 0)


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """Do something on the main process while the others wait; a failure is raised on all, so all do the same next."""
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except Exception as error:
            failure = error
    if agree(accelerator, failure is not None):
        raise failure or MapetError("the main process failed and says why")
    return result


def evaluate(evaluators: Sequence[Evaluator], accelerator: Accelerator, objective: nn.Module) -> dict[str, float]:
    """Collect what the evaluators yield, on the main process, with the objective in evaluation mode."""

    def measure() -> dict[str, float]:
        measured: dict[str, float] = {}
        objective.eval()
        try:
            with torch.no_grad():
                for evaluator in evaluators:
                    measured.update(evaluator(accelerator.unwrap_model(objective)))
        finally:
            objective.train()
        return measured

    return on_main(accelerator, measure) or {}
