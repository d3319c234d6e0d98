"""Backbones that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

_WEIGHTS = Path(__file__).parent.parent / "weights"

# By name: the folder, as ``mapet export timm`` writes it. Its README.md says how it was made and what it is worth.
RELEASED = {
    name: _WEIGHTS / name
    for name in ("mapet-micro-fashion-mnist", "mapet-tiny-fashion-mnist", "mapet-small-fashion-mnist")
}


def released_folder(name: str) -> str:
    """Return the folder of a backbone that comes with the package; any other name, or a folder's, as it is."""
    # os.path, not pathlib: false, not an error, for what no file name can be.
    if name in RELEASED and not os.path.isdir(name):  # noqa: PTH112
        return str(RELEASED[name])
    return name
