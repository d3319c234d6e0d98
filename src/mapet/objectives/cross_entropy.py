"""Cross-entropy of a linear layer's outputs, computed in chunks: the logits are never in memory all at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mapet.models.attention import product_type

MOST_LOGITS = 2**24  # of a chunk: 64 MiB in float32


def linear_cross_entropy(rows: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of ``rows @ weight.T + bias`` in nats, and the accuracy; both float32 scalars.

    The products are computed in the type of the rows, or autocast's; softmax, sums and the gradient of the weight in
    float32. The gradients are computed in the forward pass, so no chunk is computed twice.

    Args:
        rows: ``(n, D)``.
        weight, bias: ``(V, D)`` and ``(V,)``, of a linear layer.
        ids: ``(n,)`` int64, the true classes.
    """
    loss, accuracy = _LinearCrossEntropy.apply(rows, weight, bias, ids, product_type(rows), torch.is_grad_enabled())
    return loss, accuracy


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        context: Any, rows: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, dtype: torch.dtype, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        count, exact = len(rows), torch.promote_types(weight.dtype, torch.float32)
        loss, right = rows.new_zeros((), dtype=exact), rows.new_zeros((), dtype=torch.long)
        narrow_weight, narrow_bias = weight.to(dtype), bias.to(dtype)
        if with_gradient:
            of_rows, of_weight, of_bias = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
        size = max(1, MOST_LOGITS // len(weight))
        for start in range(0, count, size):
            part, true = rows[start : start + size].to(dtype), ids[start : start + size, None]
            logits = torch.addmm(narrow_bias, part, narrow_weight.T).to(exact)
            right += (logits.argmax(dim=1, keepdim=True) == true).sum()
            # In place: the logits are the largest tensor of a step.
            logits -= logits.amax(dim=1, keepdim=True)
            of_true = logits.gather(1, true)
            total = logits.exp_().sum(dim=1, keepdim=True)
            loss += (total.log() - of_true).sum()
            if with_gradient:
                # softmax - one-hot; divided by the number of rows in backward(), so that float16 does not underflow
                slope = logits.div_(total)
                slope.scatter_add_(1, true, slope.new_full(true.shape, -1.0))
                of_bias += slope.sum(0)
                slope = slope.to(dtype)
                of_rows[start : start + size] = slope @ narrow_weight
                of_weight += (slope.T @ part).to(of_weight.dtype)
        if with_gradient:
            context.save_for_backward(of_rows, of_weight, of_bias)
            context.count = count
        accuracy = right / count
        context.mark_non_differentiable(accuracy)
        return loss / count, accuracy

    @staticmethod
    def backward(context: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        of_rows, of_weight, of_bias = context.saved_tensors
        scale = slope / context.count
        return (of_rows * scale).to(of_rows.dtype), of_weight * scale, of_bias * scale, None, None, None
