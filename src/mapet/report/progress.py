"""Progress of commands on the terminal or in a log file."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mapet.engine.runfolder import RunFolder
from mapet.engine.sinks import Record

PLAIN_INTERVAL_S = 15.0
WAITING = 0.1  # share of the time; more says that images are loaded too slowly


@dataclass(frozen=True)
class Baseline:
    """What a model reaches that ignores the images.

    Attributes:
        metric: entry of a record that is compared with ``level``: ``accuracy`` of ids, ``cosine`` of features.
        level: accuracy of always guessing the most frequent id, or cosine of always predicting the mean direction.
        entropy: loss, in nats, of always predicting the overall frequencies of the ids; None for features.
        loss_key: entry of a record that is compared with ``entropy``.
    """

    metric: str
    level: float
    entropy: float | None = None
    loss_key: str = "loss"

    def describe(self, record: Record) -> str:
        """Return a record beside the baseline, and whether it is better, in words."""
        if self.entropy is None:
            gain, unit, goal = record["cosine"] - self.level, "", "above the mean"
            words = f"loss {record['loss']:.3f}  cosine {record['cosine']:.3f} (mean {self.level:.3f})"
        else:
            gain, unit, goal = self.entropy - record[self.loss_key], " nats", "below unigram"
            words = (
                f"{self.loss_key.replace('_', ' ')} {record[self.loss_key]:.3f} (unigram {self.entropy:.3f})  "
                f"token accuracy {record['accuracy']:.1%} (chance {self.level:.1%})"
            )
        verdict = f"[green]learning[/]: {gain:.2f}{unit} {goal}" if gain > 0 else f"not yet {goal}"
        return f"{words}  {verdict}"


class _BarAndStatus(Progress):
    """A progress bar with a status line below it: a narrow terminal cuts off neither."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text.from_markup(self.status)


class Meter:
    """Progress of some work: a bar on a terminal, elsewhere (a log file, SLURM) a plain line every 15 seconds.

    It is used as a context manager.

    Args:
        console: where to print.
        what: name of the work.
        total: amount of work.
        first: amount of work that is done already.
        transient: remove the bar at the end.
    """

    def __init__(self, console: Console, what: str, total: int, first: int = 0, transient: bool = True) -> None:
        self._console, self._what, self._total, self._first = console, what, total, first
        self._began = self._printed = time.monotonic()
        columns = TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("ETA")
        self._bar = _BarAndStatus(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=transient
        )
        self._task = self._bar.add_task("", total=total, completed=first)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, status: str = "", at_once: bool = False) -> None:
        """Show the amount of work done and a status.

        Args:
            done: amount of work done.
            status: a few words, in rich's markup.
            at_once: print a plain line even if the last one is recent.
        """
        self._bar.status = status
        self._bar.update(self._task, completed=done)
        now = time.monotonic()
        if not self._console.is_terminal and (at_once or now - self._printed >= PLAIN_INTERVAL_S):
            self._printed = now
            eta = (now - self._began) / max(1, done - self._first) * (self._total - done)
            self._console.print(f"{self._what} {done}/{self._total}  ETA {eta:.0f} s  {status}", soft_wrap=True)


class ProgressSink:
    """Shows the records of a training run.

    Args:
        console: where to print.
        describe: returns a record in words.
    """

    def __init__(self, console: Console, describe: Callable[[Record], str]) -> None:
        self._console, self._describe = console, describe

    def begin(self, folder: RunFolder, first_step: int, total_steps: int) -> None:
        """Start the bar."""
        self._first, self._total = first_step, total_steps
        self._meter = Meter(self._console, "step", self._total, self._first, transient=False).__enter__()

    def write(self, record: Record) -> None:
        """Show a record; results of an evaluation have a line of their own, which stays."""
        done = record["step"] + 1
        measured = [f"{key.removeprefix('eval_')} {value:.3f}" for key, value in record.items() if key[:5] == "eval_"]
        if measured:
            self._console.print(f"step {done}: {'  '.join(measured)}")
        speed = f"{record['images_per_s']:.0f} images/s"
        if "mfu" in record:
            speed += f", {record['mfu']:.0%} of the device's speed"
        if record["data_wait"] > WAITING:
            speed += f", {record['data_wait']:.0%} waiting for data"
        self._meter.show(done, f"{self._describe(record)}  {speed}", at_once=done in (self._first + 1, self._total))

    def close(self) -> None:
        """Stop the bar."""
        self._meter.__exit__()
