"""Progress on the terminal: where the run is, and whether it is learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mapet.engine.sinks import Record, RunFacts

PLAIN_INTERVAL_S = 15.0


@dataclass(frozen=True)
class Baseline:
    """What a model that does not look at the images would reach.

    Attributes:
        metric: the entry of a record that is compared with ``level``: ``accuracy`` of ids, ``cosine`` of features.
        level: the accuracy of always guessing the most frequent id; the cosine of always predicting the mean direction.
        entropy: of token ids: the loss in nats of always predicting their overall frequencies; None for features.
        loss_key: the entry that is compared with ``entropy``.
    """

    metric: str
    level: float
    entropy: float | None = None
    loss_key: str = "loss"

    def verdict(self, record: Record) -> str:
        """Say whether a record shows that the context is used."""
        if self.entropy is not None:
            gain = self.entropy - record[self.loss_key]
            return f"[green]learning[/]: {gain:.2f} nats below unigram" if gain > 0 else "not yet below unigram"
        gain = record[self.metric] - self.level
        return f"[green]learning[/]: {gain:.2f} above the mean" if gain > 0 else "not yet above the mean"

    def describe(self, record: Record) -> str:
        """Put a record into words, beside what it is compared with."""
        if self.entropy is None:
            words = f"loss {record['loss']:.3f}  cosine {record['cosine']:.3f} (mean {self.level:.3f})"
        else:
            words = (
                f"{self.loss_key.replace('_', ' ')} {record[self.loss_key]:.3f} (unigram {self.entropy:.3f})  "
                f"token accuracy {record['accuracy']:.1%} (chance {self.level:.1%})"
            )
        return f"{words}  {self.verdict(record)}"


class _BarAndStatus(Progress):
    """A bar with a status below it, so that neither is cut off on a narrow terminal."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text.from_markup(self.status)


class ProgressSink:
    """A bar on a terminal; elsewhere (a log file, SLURM) a plain line every quarter of a minute.

    Args:
        console: where to print.
        describe: puts a record into words.
    """

    def __init__(self, console: Console, describe: Callable[[Record], str]) -> None:
        self._console, self._describe = console, describe

    def begin(self, run: RunFacts) -> None:
        """Start the bar."""
        self._first, self._total = run.first_step, run.total_steps
        self._printed, self._began = float("-inf"), time.monotonic()
        self._progress = _BarAndStatus(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=self._total, completed=self._first)
        self._progress.start()

    def write(self, record: Record) -> None:
        """Show a record."""
        done = record["step"] + 1
        status = self._describe(record)
        measured = [f"{key.removeprefix('eval_')} {value:.3f}" for key, value in record.items() if key[:5] == "eval_"]
        if self._console.is_terminal:
            self._progress.status = status
            self._progress.update(self._task, completed=done)
            if measured:
                self._console.print(f"step {done}: {'  '.join(measured)}")
        elif time.monotonic() - self._printed >= PLAIN_INTERVAL_S or done == self._total or measured:
            self._printed = time.monotonic()
            rate = (self._printed - self._began) / max(1, done - self._first)
            eta = f"ETA {rate * (self._total - done):.0f} s"
            self._console.print(f"step {done}/{self._total}  {eta}  {status}  {'  '.join(measured)}", soft_wrap=True)

    def close(self) -> None:
        """Stop the bar."""
        self._progress.stop()


class Meter:
    """Progress of a pass over something: a bar on a terminal, elsewhere a plain line every quarter of a minute.

    Use it as a context manager.

    Args:
        console: where to print.
        what: is being done.
        total: how much there is to do.
    """

    def __init__(self, console: Console, what: str, total: int) -> None:
        self._console, self._what, self._total = console, what, total
        self._began = self._printed = time.monotonic()
        self._progress = Progress(
            TextColumn(what),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, status="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, status: str = "") -> None:
        """Show how much is done, and a few words."""
        self._progress.update(self._task, completed=done, status=status)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= PLAIN_INTERVAL_S:
            self._printed = now
            eta = (now - self._began) / max(1, done) * (self._total - done)
            self._console.print(f"{self._what} {done}/{self._total}  ETA {eta:.0f} s  {status}", soft_wrap=True)
