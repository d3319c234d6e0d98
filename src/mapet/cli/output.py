"""How the command line talks."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler


def set_up_logging() -> Console:
    """Send the package's log to standard error and return the console for progress beside it."""
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    package = logging.getLogger("mapet")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False
    return console
