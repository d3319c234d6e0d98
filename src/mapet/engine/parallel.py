"""How a task is computed: precision and the processes that share the work, applied from outside the network.

The task and its network know nothing of this. Compilation and activation checkpointing are added in ``wrap``. Sharding
(FSDP) is too, but also changes how the trainer saves and measures: it does both on the main process.
"""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import Optimizer

from mapet.engine.processes import join_processes
from mapet.errors import MapetError
from mapet.models.attention import cpu_has_bfloat16


def fast_precision() -> str:
    """Return the precision of ``--precision auto``: bf16 if the device
    computes it fast, fp16 on other CUDA GPUs, otherwise no."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bfloat16() and not torch.backends.mps.is_available() else "no"


def make_accelerator(precision: str = "no", accumulate: int = 1) -> Accelerator:
    """Return what computes in a precision, over all processes.

    Args:
        precision: "no" (float32), "bf16" or "fp16".
        accumulate: micro-batches per optimiser step.

    Raises:
        MapetError: if the device cannot compute in the precision.
    """
    join_processes()
    # An earlier run in this process may have had another precision. The processes stay joined.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(), mixed_precision=precision, gradient_accumulation_steps=accumulate
        )
    except ValueError as error:
        raise MapetError(f"precision {precision!r} cannot be had: {' '.join(str(error).split())}") from error
    if precision == "fp16" and accelerator.scaler is None:
        raise MapetError(f"precision 'fp16' needs a GPU, but the device is {accelerator.device}; take bf16 or no")
    return accelerator


def check_precision(precision: str) -> None:
    """Refuse a precision that the device cannot compute in; see ``make_accelerator``."""
    make_accelerator(precision)


def wrap(accelerator: Accelerator, task: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Return the task and its optimizer as they are trained: moved, in the precision, synchronised over processes."""
    # The optimizer's state stays where it is: moved, its step counts would be read back from the device each step.
    wrapped, prepared = accelerator.prepare(task, optimizer, device_placement=[True, False])
    return wrapped, prepared
