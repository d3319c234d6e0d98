"""How work is done by processes together, on a device, in a precision; applied from outside the network.

A task and its network know nothing of this. Compilation and activation checkpointing are added in ``wrap``. Sharding
(FSDP) is too, but also changes how the trainer saves and measures: it does both on the main process.

Processes are those that torchrun or accelerate launch start. Accelerate's ``PartialState`` is one object per process,
so nothing here needs to be told who its peers are.
"""

import atexit
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import reduce
from torch import nn
from torch.optim import Optimizer

from mapet.data.sources import ImageSet
from mapet.errors import MapetError, first_line
from mapet.models.attention import CPU_HAS_BFLOAT16

logger = logging.getLogger(__name__)

# The main process may fit a tokenizer for days on CPUs; by default the others give up after ten minutes.
PATIENCE = timedelta(days=7)
# In a step no process has such work: one that is waited for so long has stopped. It is longer than the patience with
# images (``mapet.data.workers``), whose message says more.
STEP_PATIENCE = timedelta(hours=1)
ROLL_CALL = timedelta(seconds=10)  # how long a process that runs may take to say so

Result = TypeVar("Result")


def join_processes() -> PartialState:
    """Return this process's place among those that were started together: rank, number, device."""
    # Accelerate joins processes on CPUs only when told that they are to use CPUs.
    world = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    if world.num_processes > 1:
        atexit.register(_leave)
    return world


def one_device() -> torch.device:
    """Return the device of a command that runs in one process.

    Raises:
        MapetError: if several processes were started.
    """
    world = join_processes()
    if world.num_processes > 1:
        raise MapetError("this command runs in one process; start it without torchrun or accelerate launch")
    return torch.device(world.device)


def _leave() -> None:
    """Leave the group of processes; otherwise the first to exit aborts the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def bounded_waits() -> Iterator[None]:
    """Give up waiting for another process after ``STEP_PATIENCE``, instead of ``PATIENCE``.

    Raises:
        MapetError: see ``explain_lost_processes``. NCCL raises no error: its watchdog ends the process, with a log.
    """
    if not dist.is_initialized():
        yield
        return
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # torch before 2.14
    set_timeout(STEP_PATIENCE)
    try:
        with explain_lost_processes():
            yield
    finally:
        set_timeout(PATIENCE)


@contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Turn an error of communication into one sentence on each process.

    Raises:
        MapetError: if another process ended, or has not answered for too long; then it names the processes.
    """
    try:
        yield
    except RuntimeError as error:  # gloo raises no other kind
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        if not re.search("time(d )?out", str(error), re.IGNORECASE):
            raise MapetError(
                "another of the processes that train together ended; its own output says why, and --resume continues "
                "from the last checkpoint"
            ) from error
        silent = ", ".join(map(str, _silent_processes())) or "(unknown: all answer now)"
        raise MapetError(
            f"process {silent} of {dist.get_world_size()} kept the others waiting for {STEP_PATIENCE}; see its output "
            "and its machine, and continue from the last checkpoint with --resume"
        ) from error


def _silent_processes() -> list[int]:
    """Return the numbers of the processes that do not say within ``ROLL_CALL`` that they run."""
    world, deadline = dist.get_world_size(), time.monotonic() + ROLL_CALL.total_seconds()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, None, False, ROLL_CALL, wait_for_workers=False)  # type: ignore[attr-defined]
        store.set(f"mapet/runs/{dist.get_rank()}", "")
    except RuntimeError:  # under srun process 0 keeps the store
        return [0]
    silent = []
    for rank in range(world):
        try:
            left = max(0.1, deadline - time.monotonic())
            store.wait([f"mapet/runs/{rank}"], timedelta(seconds=left))
        except RuntimeError:
            silent.append(rank)
    return silent


def agree(wish: bool) -> bool:
    """Return whether any process wishes it, so that all do the same next."""
    return bool(highest(int(wish)))


def highest(number: int) -> int:
    """Return the highest of the numbers that the processes give."""
    world = join_processes()
    if world.num_processes == 1:
        return number
    return int(reduce(torch.tensor(number, device=world.device), "max"))


def on_main(work: Callable[[], Result]) -> Result | None:
    """Do something on the main process while the others wait; a failure is raised on all of them."""
    result, failure = None, None
    if join_processes().is_main_process:
        try:
            result = work()
        except Exception as error:
            failure = error
    if agree(failure is not None):
        raise failure or MapetError("the main process failed; its own message says why")
    return result


def main_first(work: Callable[[], Result]) -> Result:
    """Do something on every process, on the main one before the others: a download is then made once."""
    found = on_main(work)
    return work() if found is None else found


def count_workers(asked: int | None, images: ImageSet, device: torch.device) -> int:
    """Return how many processes load images for this one: as asked, or chosen by cores and device if that is None."""
    if asked is not None:
        return asked
    if images.source.in_memory:
        return 0
    cores = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # training processes on this machine, as torchrun counts them
    # On the CPU the network needs the cores; beside an accelerator they have nothing else to do.
    return min(16, max(1, (cores if device.type != "cpu" else cores // 2) // here))


def fast_precision() -> str:
    """Return the precision of ``--precision auto``: bf16 if the device
    computes it fast, fp16 on other CUDA GPUs, otherwise no."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if CPU_HAS_BFLOAT16 and not torch.backends.mps.is_available() else "no"


def product_speed(device: torch.device, precision: str) -> float:
    """Return the operations per second of a device in large matrix products, the ceiling of a step; measured."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 512 if device.type == "cpu" else 8192
    matrix, times = torch.ones(size, size, dtype=dtype, device=device), list[float]()
    for _ in range(5):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def make_accelerator(precision: str, accumulate: int = 1) -> Accelerator:
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
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=precision, gradient_accumulation_steps=accumulate
    )
    if precision == "fp16" and accelerator.scaler is None:
        raise MapetError(f"precision 'fp16' needs a GPU, but the device is {accelerator.device}; take bf16 or no")
    return accelerator


def check_precision(precision: str) -> None:
    """Refuse a precision that the device cannot compute in; see ``make_accelerator``."""
    make_accelerator(precision)


def wrap(
    accelerator: Accelerator, task: nn.Module, optimizer: Optimizer, *, compiled: bool = False
) -> tuple[nn.Module, Optimizer]:
    """Return the task and its optimizer as they are trained: moved, in the precision, synchronised over processes.

    ``compiled`` compiles the forward and the backward pass of the task as one graph. The network that the task exports
    is not compiled.
    """
    if compiled and _can_compile(accelerator.device):
        task.forward = torch.compile(task.forward, dynamic=False)
    # The optimizer's state stays where it is: moved, its step counts would be read back from the device each step.
    wrapped, prepared = accelerator.prepare(task, optimizer, device_placement=[True, False])
    return wrapped, prepared


def _can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works here: it needs a C++ compiler, on GPUs Triton. A warning says why not."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # of torch._dynamo or torch._inductor
        logger.warning("the step is not compiled: %s", first_line(error))
        return False
    return True
