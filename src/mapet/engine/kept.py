"""Earlier checkpoints that are kept, to go on from when the last one has diverged."""

import os
import shutil
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from mapet.engine.files import replace_folder

PREFIX = "step-"
WINDOW, MOST_RISE = 100, 0.1


class LossWatch:
    """Tells whether the loss has risen: whether its median over the last steps is a tenth above the lowest so far.

    Attributes:
        lowest: the first loss, or the lowest median that ``has_risen`` found; it is part of a checkpoint.
    """

    def __init__(self, lowest: float | None = None) -> None:
        self.lowest = lowest
        self._last: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> None:
        """Take the loss of a step."""
        self._last.append(loss)
        if self.lowest is None:
            self.lowest = loss

    def has_risen(self) -> bool:
        """Return whether it has risen, and remember the lowest median."""
        if self.lowest is None or not self._last:
            return False
        now = statistics.median(self._last)
        self.lowest = min(self.lowest, now)
        return not now <= self.lowest + MOST_RISE * abs(self.lowest)  # also if it is NaN

    def __str__(self) -> str:
        return f"the loss rose from {self.lowest:.4g} to {statistics.median(self._last):.4g}"


def keep_checkpoint(checkpoint: Path, step: int, most: int) -> None:
    """Keep a checkpoint beside itself as ``step-N``, and remove others until there are at most ``most``.

    The files are hard links where the disk has them, which take no space while the checkpoint is the last one. The
    newest is always kept. Of the others, the one whose neighbours are nearest is removed first, so the rest is spread
    over the run.
    """
    target = checkpoint.with_name(f"{PREFIX}{step:08}")
    if not target.exists():
        replace_folder(target, lambda fresh: _link_files(checkpoint, fresh))
    kept = dict(kept_checkpoints(checkpoint.parent))
    while len(kept) > most:
        steps = list(kept)
        gaps = {step: later - earlier for earlier, step, later in zip([0, *steps], steps, steps[1:], strict=False)}
        leaving = kept.pop(min(gaps, key=lambda step: gaps[step]))
        hidden = leaving.rename(leaving.with_name(f".{leaving.name}.gone"))  # a kill leaves no half of a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)


def kept_checkpoints(folder: Path) -> Mapping[int, Path]:
    """Return the kept checkpoints in a folder by their number of steps, in order."""
    return {int(path.name.removeprefix(PREFIX)): path for path in sorted(folder.glob(f"{PREFIX}*"))}


def _link_files(source: Path, target: Path) -> None:
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # a file system without hard links
            shutil.copy2(file, target / file.name)
