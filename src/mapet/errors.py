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


def reason_of(error: Exception, most: int = 300) -> str:
    """Return an error's text on one line and shortened; the error's type if it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, shortened; the error's type if it has no text."""
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__
