"""What a command is: its configuration, what it says of itself, and its work."""

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mapet.config.base import Config


@dataclass(frozen=True)
class Call:
    """One call of a command.

    Attributes:
        values: configuration by key: the recipe's, overridden by flags.
        out: of ``--out``, or None.
        console: for progress and remarks, on standard error.
        flags: all that was parsed, for the flags that a command has besides its configuration's.
    """

    values: dict[str, Any]
    out: Any
    console: Console
    flags: argparse.Namespace

    def say(self, text: str) -> None:
        """Print a remark on standard error, as it is and on lines of any length."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def unfinished(self, result: Any) -> int | None:
        """Return the exit status of a run that a signal stopped, or that another process reports; None of others.

        It is 128 + the signal on all processes, so that a scheduler may be told to requeue jobs that end with it.

        Args:
            result: the trainer's ``Result``.
        """
        if result.finished:
            return None if result.is_main else 0
        if result.is_main:
            self.say(f"stopped and saved after step {result.steps}; --resume continues {result.folder.root}")
        return 128 + (result.stopped_by or 0)


@dataclass(frozen=True)
class Verb:
    """A command ``mapet NAME``.

    Attributes:
        summary: a line for ``mapet --help``.
        configs: whose keys are its flags; the first one's come first.
        run: does the work and returns the exit status. What needs torch is imported in it.
        about: what ``mapet NAME --help`` says first; by default the summary.
        example: command lines to begin with.
        positional: keys that are given without a flag, in order, with the help of each that differs from the key's.
        required: those of them that must be given.
        out: help of ``--out``; None if there is none.
        out_metavar: what ``--out`` takes.
        needs_out: whether it must be given.
        recipe: whether ``--config`` takes a recipe; a name is the recipe taken by default.
        resume: help of ``--resume``; None if there is none.
        json: help of ``--json``; None if there is none.
        left_out: keys that are no flags.
        check_data: refuses images that are not there, before torch is imported.
        options: adds flags besides the configuration's.
    """

    summary: str
    configs: tuple[type[Config], ...]
    run: Callable[[Call], int]
    about: str = ""
    example: str = ""
    positional: Mapping[str, str | None] | None = None
    required: bool = False
    out: str | None = None
    out_metavar: str = "FOLDER"
    needs_out: bool = True
    recipe: bool | str = True
    resume: str | None = None
    json: str | None = None
    left_out: Collection[str] = ()
    check_data: Callable[[str], None] | None = None
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
