"""Backbones that come with the package."""

import os
from pathlib import Path

# Folder of each backbone, as ``mapet export timm`` writes it; its README.md says how it was made and how good it is.
RELEASED = {"mapet-micro-fashion-mnist": Path(__file__).parent.parent / "weights" / "mapet-micro-fashion-mnist"}


def released_folder(name: str) -> str:
    """Return the folder of a backbone that comes with the package; return other names, and folders, unchanged."""
    # os.path, not pathlib: os.path.isdir returns False for text that cannot be a file name, where pathlib raises.
    if name in RELEASED and not os.path.isdir(name):  # noqa: PTH112
        return str(RELEASED[name])
    return name
