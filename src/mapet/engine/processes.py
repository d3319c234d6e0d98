"""Choices that depend on the machine, and what processes that work together do together."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from mapet.data.sources import ImageSet
from mapet.engine.loop import on_main
from mapet.errors import MapetError
from mapet.models.attention import cpu_has_bfloat16

# The main process may fit a tokenizer for days on CPUs; by default the others wait ten minutes.
PATIENCE = timedelta(days=7)

Result = TypeVar("Result")


def make_accelerator(precision: str = "no", accumulate: int = 1) -> Accelerator:
    """Return the accelerator of this process: its device, its precision, its place among the others.

    Args:
        precision: "no", "bf16", "fp16", or "auto": bf16 where the device has it fast, else no.
        accumulate: micro-batches per optimiser step.

    Raises:
        MapetError: if the device cannot train in the precision.
    """
    precision = _fast_precision() if precision == "auto" else precision
    # An earlier run in this process may have had another precision. The processes stay joined.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            # Accelerate joins processes on CPUs only when told that it is CPUs that they are to use.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=precision,
            gradient_accumulation_steps=accumulate,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise MapetError(f"precision {precision!r} cannot be had: {' '.join(str(error).split())}") from error
    if precision == "fp16" and accelerator.scaler is None:
        raise MapetError(f"precision 'fp16' needs a GPU, but the device is {accelerator.device}; take bf16 or no")
    if accelerator.num_processes > 1:
        atexit.register(_leave)
    return accelerator


def one_device(precision: str = "no") -> torch.device:
    """Return the device of a command that runs in one process; see ``make_accelerator``.

    Raises:
        MapetError: if several processes were started, or the device lacks the precision.
    """
    accelerator = make_accelerator(precision)
    if accelerator.num_processes > 1:
        raise MapetError("this command runs in one process; start it without torchrun or accelerate launch")
    return torch.device(accelerator.device)


def _leave() -> None:
    """Leave the group of processes; else the first to exit aborts the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _fast_precision() -> str:
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bfloat16() and not torch.backends.mps.is_available() else "no"


def count_workers(asked: int | None, images: ImageSet, device: torch.device) -> int:
    """Return how many processes should load images for this one, if it is not said (None)."""
    if asked is not None:
        return asked
    if images.in_memory:
        return 0
    cores = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # training processes on this machine, by torchrun's count
    # On the CPU the network needs the cores; beside an accelerator they have nothing else to do.
    return min(16, max(1, (cores if device.type != "cpu" else cores // 2) // here))


def main_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do something on every process, on the main one before the others: what it downloads is downloaded once."""
    found = on_main(accelerator, work)
    return work() if found is None else found
