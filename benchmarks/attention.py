"""Time masked attention, forward and backward, in two forms: torch's fused kernel and plain matrix products.

    python benchmarks/attention.py

The shapes are those of MaPeT at 224 px with patches of 16 px: 491 rows attend to 344 keys.
`mapet.models.attention.attend` chooses its form by this measurement.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mapet.objectives.mapet import visible_keys


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value


def median_ms(form: Callable[..., Tensor], dtype: torch.dtype, device: str, rounds: int = 10) -> float:
    mask = visible_keys(50, 147, 147, slots=True, queries=True).to(device)
    rows, keys = mask.shape
    query, key, value = (
        torch.randn(8, 3, n, 64, dtype=dtype, device=device, requires_grad=True) for n in (rows, keys, keys)
    )
    taken = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        form(query, key, value, mask).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken[2:])


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (median_ms(form, dtype, device) for form in (fused, explicit))
        print(f"{dtype!s:15} fused {a:7.1f} ms   explicit {b:7.1f} ms   explicit / fused {b / a:.2f}")
