"""Choices that depend on the machine."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from mapet.config import PretrainConfig
from mapet.data import ImageSet


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """Return the accelerator of this process: its device, its precision, its place among the others."""
    precision = _fast_precision() if config.precision == "auto" else config.precision
    return Accelerator(mixed_precision=precision, gradient_accumulation_steps=config.accumulate)


def _fast_precision() -> str:
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if native and not torch.backends.mps.is_available() else "no"


def count_workers(config: PretrainConfig, images: ImageSet, device: torch.device, processes: int) -> int:
    """Return how many processes should load images for this one, if the configuration does not say."""
    if config.workers is not None:
        return config.workers
    if images.in_memory:
        return 0
    cores = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    # On the CPU the network needs the cores; beside an accelerator they have nothing else to do.
    return min(16, max(1, (cores if device.type != "cpu" else cores // 2) // processes))
