"""The format of the tables in docs/: the mean over seeds, with the range."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> str:
    """Write values as "mean (least to greatest)"; a dash if there are none."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "-"
