"""The one exception that users are meant to see."""

import difflib
from collections.abc import Iterable


class MapetError(Exception):
    """Bad input: one sentence that names the input, what is wrong with it and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def nearest(name: str, valid: Iterable[str], most: int = 3) -> str:
    """Return "did you mean ...?" for the valid names closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(valid), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
