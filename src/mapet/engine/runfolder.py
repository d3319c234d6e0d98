"""The run folder: where things lie in it, and how it is opened.

config.yaml          the settled configuration
log.txt              the log, with damaged images by name
metrics.jsonl        a line per logged step
tensorboard/         the same as TensorBoard events
tokenizer/           the fitted tokenizer
baseline.json        loss and accuracy of a model that does not look at the images
origin.json          the record of the run whose weights this one began with
checkpoints/last/    everything needed to continue
checkpoints/step-N/  earlier ones, see --keep and --branch-of
exported/            the network, for timm
figures/             pictures
results.json         results of an evaluation
"""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from mapet.config.base import Config, config_to_yaml
from mapet.engine.files import explain_disk_errors, find_folder, held_folder, recover_folder, replace_file
from mapet.engine.parallel import explain_lost_processes
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

# Left by a run that was refused, or written by a launcher such as SLURM before the run begins.
LEFT_BEFORE, LAUNCHERS_LOGS = {".lock", "log.txt"}, (".err", ".log", ".out")


class RunFolder:
    """Paths of a run, below ``root``."""

    def __init__(self, root: str | Path) -> None:
        if not str(root):
            raise MapetError("the name of the output folder is empty; say where with --out FOLDER")
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.log = self.root / "log.txt"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.tokenizer = self.root / "tokenizer"
        self.baseline = self.root / "baseline.json"
        self.origin = self.root / "origin.json"
        self.checkpoint = self.root / "checkpoints" / "last"
        self.exported = self.root / "exported"
        self.figures = self.root / "figures"
        self.results = self.root / "results.json"
        self.held = ExitStack()

    def open(self, *, resume: bool) -> None:
        """Create the folder, or accept an existing run to be resumed; hold it until ``held`` is closed; log into it.

        Raises:
            MapetError: if it holds a run that is not to be resumed, or another process holds it.
            OSError: if it cannot be written to.
        """
        if self.config.exists() and not resume:
            raise MapetError(
                f"output folder {self.root} already holds a run; pass --resume to continue it, or another --out"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / ".lock").touch()  # without permission to write, it would seem that there are no locks
        self.held.enter_context(held_folder(self.root))
        for folder in (self.tokenizer, self.checkpoint, self.exported):
            recover_folder(folder)
        log_to(self.log)

    def holds_checkpoint(self) -> bool:
        """Return whether there is a checkpoint; it may have the temporary name that a kill left it with."""
        return find_folder(self.checkpoint) is not None

    def find_export(self) -> Path | None:
        """Return the folder of the exported network, under its temporary name after a kill; None without one."""
        return find_folder(self.exported)

    def write_config(self, config: Config) -> None:
        """Write down the configuration, which makes the folder a run, unless one was begun here before."""
        if not self.config.exists():
            replace_file(self.config, config_to_yaml(config))

    def metric_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the records of metrics.jsonl; a last line that a kill cut short is skipped."""
        if not self.metrics.exists():
            return
        with self.metrics.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if (record := _read_record(line)) is not None:
                    yield record
                elif line.endswith(b"\n"):
                    logger.warning("skipped line %d of %s, which is damaged", number, self.metrics)

    def some_metrics(self, most: int = 10_000) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, or of a long file a part that is spread evenly over it.

        The time that this takes does not grow with the length of the file.
        """
        if not self.metrics.exists() or not (size := self.metrics.stat().st_size):
            return []
        with self.metrics.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            places = ((size - 1) * part // (most - 1) for part in range(most))
            starts = {content.rfind(b"\n", 0, place) + 1 for place in places}
            records = (_read_record(content[start : content.find(b"\n", start) + 1]) for start in sorted(starts))
            return [record for record in records if record is not None]

    def forget_metrics_from(self, step: int) -> None:
        """Cut off the records of steps that a resumed run computes again. The lines before them are not read."""
        with self.metrics.open("r+b") as file:
            end = 0
            if size := self.metrics.stat().st_size:
                with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                    end = content.rfind(b"\n", 0, size) + 1
                    while end:
                        start = content.rfind(b"\n", 0, end - 1) + 1
                        record = _read_record(content[start:end])
                        if record is not None and record["step"] < step:
                            break
                        end = start
            file.truncate(end)


def _read_record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line; None if the line is damaged, or was cut short by a kill."""
    if not line.endswith(b"\n"):
        return None
    try:
        record: dict[str, Any] = json.loads(line)
        return record if record["step"] >= 0 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


@contextmanager
def run_folder(out: str | Path) -> Iterator[RunFolder]:
    """Give the folder of a run and let go of it at the end; the system's refusals become one sentence.

    Raises:
        MapetError: at once if the folder holds other things than a run.
    """
    folder = RunFolder(out)
    with explain_disk_errors(folder.root), explain_lost_processes(), folder.held:
        files = {path.name for path in folder.root.iterdir()} if folder.root.exists() else set()
        foreign = sorted(name for name in files - LEFT_BEFORE if not name.endswith(LAUNCHERS_LOGS))
        # Checked last, because another process of this run may be writing it.
        if foreign and not folder.config.exists():
            raise MapetError(
                f"output folder {folder.root} holds {foreign[0]!r}, but no run; choose a new or empty folder with --out"
            )
        yield folder


def check_out(data: str, out: str | Path) -> None:
    """Refuse an output folder without a name, or inside the image folder."""
    images, root = Path(data).resolve(), RunFolder(out).root.resolve()
    if images.is_dir() and root.is_relative_to(images):
        raise MapetError(
            f"output folder {out} lies inside the image folder {data}, so pictures written to it would count as "
            "images of yours; choose an --out outside of it"
        )


def log_to(file: Path) -> None:
    """Write the package's log to this file too, and no longer to the file of an earlier run."""
    package = logging.getLogger("mapet")
    for handler in [handler for handler in package.handlers if isinstance(handler, logging.FileHandler)]:
        package.removeHandler(handler)
        handler.close()
    # File names need not be valid Unicode.
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)


def run_of(model: str | Path) -> RunFolder | None:
    """Return the run folder that a model is or lies in (its ``exported/``); None for other models."""
    folder = Path(str(model).removeprefix("local-dir:"))
    places = [folder, folder.parent] if folder.name == "exported" else [folder]
    return next((run for run in map(RunFolder, places) if run.config.is_file()), None)
