"""Logging of the command line."""

import logging

from rich.console import Console
from rich.text import Text


class ConsoleHandler(logging.Handler):
    """Prints log records above a progress bar; a record stays one line on terminals of any width."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; warnings and errors begin with their level."""
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        style = "" if record.levelno < logging.WARNING else "yellow"
        self._console.print(Text(prefix + record.getMessage(), style), soft_wrap=True)


class Once(logging.Filter):
    """Lets each message pass only once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the message is new."""
        message = record.getMessage()
        new = message not in self._said
        self._said.add(message)
        return new


def set_up_logging() -> Console:
    """Send the package's log to standard error and return the console for progress beside it."""
    console = Console(stderr=True)
    package = logging.getLogger("mapet")
    package.handlers[:] = [ConsoleHandler(console)]
    package.setLevel(logging.INFO)
    package.propagate = False
    # This logger names damaged images, and each pass over the images meets them again.
    logging.getLogger("mapet.data.batches").filters[:] = [Once()]
    return console
