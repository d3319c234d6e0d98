"""Replacing files and folders so that a kill at any moment leaves the old or the new one, whole."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mapet.errors import MapetError


def replace_file(target: Path, text: str) -> None:
    """Replace the file ``target`` by one with the content ``text``."""
    fresh = target.with_name(f".{target.name}.new")
    try:
        fresh.write_text(text)
        _flush(fresh)
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


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


@contextmanager
def claimed_folder(target: Path) -> Iterator[None]:
    """Hold the name of a new folder, to be made by ``replace_folder``, for this process.

    Raises:
        MapetError: if it exists and is not empty, another process is making it, or it cannot be written.
    """
    with _claimed(
        target, lambda: target.exists() and (not target.is_dir() or any(target.iterdir())), " and is not empty"
    ):
        yield


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; it is renamed to ``target`` at the end.

    An error leaves no file, a kill no file of the final name.

    Raises:
        MapetError: if ``target`` exists, another process is making it, or it cannot be written.
    """
    fresh = target.with_name(f".{target.name}.new")
    with _claimed(target, target.exists):
        try:
            yield fresh
            _flush(fresh)
            fresh.replace(target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        _flush(target.parent)


@contextmanager
def _claimed(target: Path, taken: Callable[[], bool], how: str = "") -> Iterator[None]:
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        if taken() or target.is_symlink():  # a link to nothing does not exist()
            raise MapetError(f"output {target} is there already{how}; choose another --out")
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).touch()  # without permission to write, the lock would seem taken
        lock.acquire(timeout=0)
    except Timeout:
        raise MapetError(
            f"output {target} is being made by another process; wait for it or choose another --out"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise MapetError(f"output {target} cannot be written to ({error}); choose another --out") from error
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
