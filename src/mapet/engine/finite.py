"""When a loss or gradient is NaN or infinite: say why before any weight is touched."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mapet.errors import MapetError


def check_finite(
    step: int, inputs: Sequence[object], task: nn.Module, loss: float, *, grad_norm: float, lr: float, precision: str
) -> None:
    """Raise if the step's loss or gradient is NaN or infinite. Call it before the optimizer steps.

    In fp16 an infinite gradient is ordinary: the loss scaler then skips the step by itself.

    Raises:
        MapetError: with the likeliest cause and what to do.
    """
    if math.isfinite(loss) and (math.isfinite(grad_norm) or precision == "fp16"):
        return
    broken = [name for name, parameter in task.named_parameters() if not parameter.isfinite().all()]
    if not all(bool(part.isfinite().all()) for part in inputs if isinstance(part, Tensor)):
        cause = "the input contains NaN or infinity; look at --mean, --std and the files"
    elif broken:
        cause = f"the weights were not finite before the step (first {broken[0]!r}); resume from the checkpoint"
    elif math.isfinite(loss):
        gradients = ((name, p.grad) for name, p in task.named_parameters() if p.grad is not None)
        first = next((name for name, grad in gradients if not grad.isfinite().all()), "their norm")
        cause = f"the gradients overflowed (first {first!r}); start another run with a lower --lr or a longer --warmup"
    else:
        cause = "the forward pass overflowed; start another run with a lower --lr, a longer --warmup, or --precision no"
    raise MapetError(
        f"step {step}: loss {loss:g}, gradient norm {grad_norm:g} at learning rate {lr:.3g} in precision "
        f"{precision!r}: {cause}. No weight was changed by this step; the last checkpoint is whole"
    )
