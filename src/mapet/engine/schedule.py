"""Schedules are pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, total: int, warmup: int, start: float, peak: float, end: float) -> float:
    """Learning rate at ``step`` of ``total``: linear from ``start`` to ``peak``, then cosine to ``end``.

    The first of ``warmup`` steps has ``start``, step ``warmup`` has ``peak``, the last step nearly ``end``.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))
