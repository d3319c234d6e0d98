"""When a loss or gradient is NaN or infinite: say where it began, before any weight is touched."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mapet.data.batches import Batch, printable
from mapet.data.sources import ImageSet

MOST_NAMED = 3


def is_finite(loss: float, grad_norm: float, precision: str) -> bool:
    """Return whether the optimizer may take a step.

    In fp16 an infinite gradient is ordinary: the loss scaler then skips the step by itself.
    """
    return math.isfinite(loss) and (math.isfinite(grad_norm) or precision == "fp16")


def find_cause(task: nn.Module, inputs: Sequence[Any], loss: float, batch: Batch, images: ImageSet) -> str:
    """Return in words where NaN or infinity began: in which input, weight, layer or gradient, and in which images."""
    for part in inputs:
        if isinstance(part, Tensor) and not bool(part.isfinite().all()):
            return f"the input contains NaN or infinity{_named(part, batch, images)}; look at --mean and --std"
    broken = next((name for name, value in task.named_parameters() if not value.isfinite().all()), None)
    if broken is not None:
        return f"the weight {broken!r} was not finite before the step"
    if math.isfinite(loss):
        # The backward pass goes from the last layer to the first.
        gradients = [(name, value.grad) for name, value in task.named_parameters() if value.grad is not None]
        first = next((name for name, value in reversed(gradients) if not value.isfinite().all()), None)
        return (
            "the norm of the gradients overflowed" if first is None else f"the gradient of {first!r} overflowed first"
        )
    found: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, given, output, name=name: _note(found, name, output))
        for name, module in task.named_modules()
        if name and not list(module.children())
    ]
    try:
        with torch.no_grad():
            type(task).forward(task, *inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "the forward pass overflowed in the loss, or in another process"
    name, output = found[0]
    return f"the forward pass overflowed, first in {name!r}{_named(output, batch, images)}"


def _note(found: list[tuple[str, Tensor]], name: str, output: Any) -> None:
    if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
        found.append((name, output))


def _named(values: Tensor, batch: Batch, images: ImageSet) -> str:
    """Return the names of the images whose values are not finite, in brackets; nothing if it cannot be told."""
    if len(values) != len(batch["index"]):
        return ""
    rows = (~values.isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    names = [printable(images.key(int(batch["index"][row]))) for row in rows]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f" (images {', '.join(names[:MOST_NAMED])}{more})"
