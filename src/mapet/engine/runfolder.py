"""The run folder: where things lie in it, and which process may write to it.

config.yaml          the settled configuration
log.txt              the log, with damaged images by name
metrics.jsonl        a line per logged step
tensorboard/         the same as TensorBoard events
tokenizer/           the fitted tokenizer
baseline.json        loss and accuracy of a model that does not look at the images
origin.json          the record of the run whose weights this one began with
checkpoints/last/    everything needed to continue
exported/            the network, for timm
figures/             pictures
results.json         results of an evaluation
"""

import errno
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mapet.config.base import Config, config_to_yaml
from mapet.engine.files import find_folder, recover_folder, replace_file
from mapet.errors import MapetError

logger = logging.getLogger(__name__)

LAUNCHERS_LOGS = (".err", ".log", ".out")


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
        self.lock: FileLock | None = None

    def check(self) -> None:
        """Accept a folder that does not exist, is empty, or holds a run.

        Raises:
            MapetError: for a file, or a folder with other contents.
        """
        if not self.root.exists():
            return
        if not self.root.is_dir():
            raise MapetError(f"output {self.root} is a file; choose a folder with --out")
        # Left by a run that was refused, or written by a launcher such as SLURM before the run begins.
        left = {".lock", ".writable", self.log.name}
        foreign = sorted(
            path.name for path in self.root.iterdir() if path.name not in left and path.suffix not in LAUNCHERS_LOGS
        )
        # Checked last, because another process of this run may be writing it.
        if foreign and not self.config.exists():
            raise MapetError(
                f"output folder {self.root} holds {foreign[0]!r}, but no run; choose a new or empty folder with --out"
            )

    def open(self, *, resume: bool) -> None:
        """Create the folder, or accept an existing run to be resumed; hold it for this process and log into it.

        Raises:
            MapetError: if it cannot be written to, holds other things, or a run that is not to be resumed.
        """
        self.check()
        if self.config.exists() and not resume:
            raise MapetError(
                f"output folder {self.root} already holds a run; pass --resume to continue it, or another --out"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise MapetError(
                f"output folder {self.root} cannot be written to ({error.strerror}); choose another --out"
            ) from error
        self.lock = lock_folder(self.root)
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

    def close(self) -> None:
        """Release the folder for other processes."""
        if self.lock is not None:
            self.lock.release()

    def metric_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the records of metrics.jsonl; a last line that a kill cut short is skipped."""
        if not self.metrics.exists():
            return
        with self.metrics.open(errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    continue
                try:
                    record = json.loads(line)
                    record["step"] + 1
                    yield record
                except (ValueError, TypeError, KeyError):
                    logger.warning("skipped line %d of %s, which is damaged", number, self.metrics)

    def forget_metrics_from(self, step: int) -> None:
        """Remove the records of steps that a resumed run computes again."""
        kept = [json.dumps(line) + "\n" for line in self.metric_lines() if line["step"] < step]
        replace_file(self.metrics, "".join(kept))


@contextmanager
def run_folder(out: str | Path) -> Iterator[RunFolder]:
    """Give the folder of a run and let go of it at the end; the system's refusals become one sentence.

    Raises:
        MapetError: at once if the folder holds other things than a run.
    """
    folder = RunFolder(out)
    with explain_disk_errors(folder.root):
        folder.check()
        try:
            yield folder
        finally:
            folder.close()


def check_out(data: str, out: str | Path) -> None:
    """Refuse an output folder without a name, or inside the image folder."""
    if not str(out):
        raise MapetError("the name of the output folder is empty; say where with --out FOLDER")
    images = Path(data).resolve()
    if images.is_dir() and Path(out).resolve().is_relative_to(images):
        raise MapetError(
            f"output folder {out} lies inside the image folder {data}, so pictures written to it would count as "
            "images of yours; choose an --out outside of it"
        )


def log_to(file: Path) -> None:
    """Also write the package's log to a file, and to no other file any more."""
    package = logging.getLogger("mapet")
    for handler in [handler for handler in package.handlers if isinstance(handler, logging.FileHandler)]:
        package.removeHandler(handler)
        handler.close()
    # File names need not be valid Unicode.
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)


def lock_folder(root: Path, name: str = ".lock", *, patience_s: float = 0) -> FileLock:
    """Hold a folder for this process; the system releases it when the process ends.

    Args:
        root: the folder.
        name: of the lock file in it.
        patience_s: how long to wait for another process, in seconds; -1 waits for ever.

    Raises:
        MapetError: if another process holds it. A file system without locks gives a warning.
    """
    lock = FileLock(root / name)
    try:
        lock.acquire(timeout=patience_s)
    except Timeout:
        raise MapetError(
            f"output folder {root} is in use by another process; wait for it or choose another --out"
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning("output folder %s cannot be locked (%s); let no other process write to it", root, error)
    return lock


@contextmanager
def held_folder(root: Path, name: str = ".lock", *, patience_s: float = 0) -> Iterator[None]:
    """Hold a folder while the ``with`` statement lasts; see ``lock_folder``."""
    lock = lock_folder(root, name, patience_s=patience_s)
    try:
        yield
    finally:
        lock.release()


def run_of(model: str | Path) -> RunFolder | None:
    """Return the run folder that a model is or lies in (its ``exported/``); None for other models."""
    folder = Path(str(model).removeprefix("local-dir:"))
    places = [folder, folder.parent] if folder.name == "exported" else [folder]
    return next((run for run in map(RunFolder, places) if run.config.is_file()), None)


@contextmanager
def explain_disk_errors(root: Path) -> Iterator[None]:
    """Turn the operating system's errors about files below ``root`` into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reasons = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EFBIG: "a file grew over the size limit: raise the limit",
            errno.EROFS: "the disk is read-only: choose another --out",
            errno.EACCES: "permission is denied: choose another --out",
            errno.EPERM: "permission is denied: choose another --out",
        }
        number = _errno(error)
        where = getattr(error, "filename", None) or (root if number in reasons else None)
        if where is None:
            raise
        if not Path(where).absolute().is_relative_to(root.absolute()):
            raise MapetError(f"cannot open {where} ({error})") from error
        if number not in reasons:
            raise MapetError(
                f"{where} in the output folder is not what belongs there ({error}); remove it or choose another --out"
            ) from error
        raise MapetError(f"cannot write to {where}: {reasons[number]}; what was saved before is whole") from error


def _errno(error: Exception) -> int | None:
    """Return the system's error number; safetensors writes it into its message: "... (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else None
