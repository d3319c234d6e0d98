"""Output files and folders: whole after a kill at any moment, written by one process, refusals as one sentence."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mapet.errors import MapetError

logger = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace_file(target: Path, text: str) -> None:
    """Replace the file ``target`` by one with the content ``text``."""
    with _fresh_file(target) as fresh:
        fresh.write_text(text)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replace the folder ``target`` by one that ``write`` fills.

    The new folder is written and flushed beside the old one, then both are renamed. Between the renames the old folder
    is called ``.NAME.old``; ``recover_folder`` restores it.
    """
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    recover_folder(target)
    fresh.mkdir(parents=True)
    try:
        write(fresh)
        for file in fresh.iterdir():
            file.chmod(fresh.stat().st_mode & 0o666)  # safetensors ignores the umask
            _flush(file)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def find_folder(target: Path) -> Path | None:
    """Return the folder with the content of ``target``, which may still be ``.NAME.old``; None if there is none."""
    old = target.with_name(f".{target.name}.old")
    return next((folder for folder in (target, old) if folder.exists()), None)


def recover_folder(target: Path) -> None:
    """Clear up after a kill inside ``replace_folder``."""
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; it is renamed to ``target`` at the end.

    An error leaves no file, a kill no file of the final name.

    Raises:
        MapetError: if ``target`` exists, another process is making it, or it cannot be written.
    """
    with claimed_folder(target), _fresh_file(target) as fresh:
        if target.is_dir():
            raise MapetError(f"output {target} is a folder; choose another --out")
        yield fresh


@contextmanager
def claimed_folder(target: Path) -> Iterator[None]:
    """Hold the name of a new folder, to be made by ``replace_folder``, or of a new file, for this process.

    Raises:
        MapetError: if it exists and is no empty folder, another process is making it, or it cannot be written.
    """
    lock = target.parent / f".{target.name}.lock"
    try:
        is_taken = any(target.iterdir()) if target.is_dir() else target.exists()
        if is_taken or target.is_symlink():  # a link to nothing does not exist()
            how = " and is not empty" if target.is_dir() else ""
            raise MapetError(f"output {target} is there already{how}; choose another --out")
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()  # without permission to write, it would seem that there are no locks
    except OSError as error:
        raise MapetError(f"output {target} cannot be written to ({error}); choose another --out") from error
    held = held_folder(target.parent, lock.name, output=target)
    try:
        with held, explain_disk_errors(target):
            yield
    finally:
        lock.unlink(missing_ok=True)


def held_folder(root: Path, name: str = ".lock", *, patience_s: float = 0, output: Path | None = None) -> ExitStack:
    """Hold a folder until what is returned is closed, for instance by ``with``, or the process ends.

    Args:
        root: the folder.
        name: of the lock file in it.
        patience_s: how long to wait for another process, in seconds; -1 waits for ever.
        output: what is held, for messages; None for the folder.

    Raises:
        MapetError: if another process holds it. A file system without locks gives a warning.
    """
    lock = FileLock(root / name)
    try:
        lock.acquire(timeout=patience_s)
    except Timeout:
        busy = f"output {output or root} is in use by another process"
        raise MapetError(f"{busy}; wait for it or choose another --out") from None
    except (NotImplementedError, OSError) as error:
        logger.warning("output folder %s cannot be locked (%s); let no other process write to it", root, error)
    held = ExitStack()
    held.callback(lock.release)
    return held


@contextmanager
def explain_disk_errors(root: Path) -> Iterator[None]:
    """Turn the operating system's errors about files below ``root``, and a full disk, into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # safetensors writes the system's number into its message
        is_full = (int(told[1]) if told else getattr(error, "errno", None)) in NO_SPACE
        file = getattr(error, "filename", None)
        if not is_full and (file is None or not Path(file).absolute().is_relative_to(root.absolute())):
            raise
        advice = "free some space or raise the limit; what was saved is whole" if is_full else "choose another --out"
        raise MapetError(f"output folder {root} cannot be written to ({error}); {advice}") from error


@contextmanager
def _fresh_file(target: Path) -> Iterator[Path]:
    fresh = target.with_name(f".{target.name}.new")
    try:
        yield fresh
        _flush(fresh)
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
