"""Choices that depend on the machine."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from mapet.config import PretrainConfig
from mapet.data import ImageSet
from mapet.errors import MapetError
from mapet.models import cpu_has_bfloat16

# The main process may fit a tokenizer or evaluate for longer than the ten minutes that the others wait by default.
PATIENCE = timedelta(hours=12)


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """Return the accelerator of this process: its device, its precision, its place among the others.

    Raises:
        MapetError: if the device cannot train in the precision.
    """
    precision = _fast_precision() if config.precision == "auto" else config.precision
    try:
        accelerator = Accelerator(
            # Accelerate joins processes on CPUs only when told that it is CPUs that they are to use.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=precision,
            gradient_accumulation_steps=config.accumulate,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise MapetError(f"precision {precision!r} cannot be had: {' '.join(str(error).split())}") from error
    if precision == "fp16" and accelerator.scaler is None:
        raise MapetError(f"precision 'fp16' needs a GPU, but the device is {accelerator.device}; take bf16 or no")
    return accelerator


def _fast_precision() -> str:
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bfloat16() and not torch.backends.mps.is_available() else "no"


def count_workers(config: PretrainConfig, images: ImageSet, device: torch.device) -> int:
    """Return how many processes should load images for this one, if the configuration does not say."""
    if config.workers is not None:
        return config.workers
    if images.in_memory:
        return 0
    cores = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # training processes on this machine, by torchrun's count
    # On the CPU the network needs the cores; beside an accelerator they have nothing else to do.
    return min(16, max(1, (cores if device.type != "cpu" else cores // 2) // here))
