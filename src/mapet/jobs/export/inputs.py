"""What an exported file must say of its input and output, since it has no configuration beside it."""

from __future__ import annotations

from typing import Any

from mapet.inference.models import OpenModel


def describe_inputs(opened: OpenModel) -> dict[str, Any]:
    """Return, JSON-able, how images are made into a model's input, and what its output means.

    Returns:
        ``input_size`` (channels, rows, columns), ``mean`` and ``std`` of pixels in [0, 1], ``crop_pct``, ``crop_mode``
        (timm's: "center", or "squash", which resizes both sides), ``interpolation``, and ``classes``, which is empty
        for a model that gives features.
    """
    view = opened.view
    return {
        "input_size": [opened.channels, *view.size],
        "mean": list(view.mean),
        "std": list(view.std),
        "crop_pct": view.crop_pct,
        "crop_mode": "squash" if view.squash else "center",
        "interpolation": view.interpolation,
        "classes": list(opened.classes),
    }


def output_name(opened: OpenModel) -> str:
    """Return what the model gives: "logits", or "features" where it has no classifier."""
    return "logits" if opened.classes else "features"
