"""Where commands write: folders that one process owns at a time, and names that are not taken yet."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import quoted, writing

LOCK = ".lock"
"""The file in an output folder that keeps other commands away."""

_PARTS = re.compile(r"\.[0-9a-f]{16}\.part")
"""Names of the unfinished files of `files.replacing`."""


def unused(path: Path, same: Callable[[Path], bool]) -> Path:
    """The first of a.png, a-2.png, a-3.png, ... that does not exist, or that `same` allows to be overwritten.

    Args:
        same: Whether a file holds the very thing that is about to be written; a ValueError counts as no.
    """
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        with contextlib.suppress(ValueError):
            if not os.path.lexists(candidate) or same(candidate):
                return candidate
    raise AssertionError


def writable_folder(path: Path) -> Path:
    """Makes the folder, and checks that files can be written there before hours of work depend on it.

    Raises:
        ValueError: If that cannot be the name of a folder.
        OSError: If nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"Cannot write to the output folder {quoted(path)}: {error.strerror}.") from error
    except ValueError:  # a NUL byte
        raise ValueError(f"{str(path)!r} is not a valid folder name.") from None
    return path


@contextmanager
def owned(output: Path, *, folder: bool = True, main: bool = True) -> Iterator[None]:
    """Keeps other commands away from an output until the block or the process ends, even if the process is killed.

    The output folder is made, and unfinished files that killed commands left in it are removed.

    Args:
        folder: Whether the output is a folder; else it is a file.
        main: Whether this process is the one that takes ownership; the other processes of the same command just go on.

    Raises:
        ValueError: If another command is writing there.
        OSError: If nothing can be written there.
    """
    if not main:
        yield
        return
    from filelock import FileLock, Timeout

    home = writable_folder(output if folder else output.parent)
    path = home / (LOCK if folder else f".{output.name}{LOCK}")
    lock = FileLock(path, blocking=False)
    with writing(output):
        try:
            lock.acquire()
            while not path.exists():  # its last owner has just removed it
                lock.release()
                lock.acquire()
        except Timeout:
            raise ValueError(f"Another command is writing to {output}: wait for it to end, or choose another output.") from None
    try:
        if folder:
            _remove_parts(home)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still ours
        lock.release()


def _remove_parts(home: Path) -> None:
    """Removes unfinished files of killed commands, but not from folders that are owned on their own."""
    for place, folders, names in os.walk(home):
        folders[:] = [name for name in folders if not Path(place, name, LOCK).exists()]
        for name in filter(_PARTS.fullmatch, names):
            Path(place, name).unlink(missing_ok=True)


@contextmanager
def folder_in_place(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends without an exception, with the permissions that the umask allows.

    A lock in it tells a running process from one that was killed, whose folder is emptied and reused.

    Raises:
        ValueError: If another process is writing there.
    """
    from filelock import FileLock, Timeout

    folder = target.parent / f".{target.name}.part"
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        with writing(folder):
            folder.mkdir(exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                message = f"Another command is writing {target}: wait until it has ended, or choose another target."
                raise ValueError(message) from None
        for left in folder.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()
        yield folder
        with writing(target):
            os.replace(folder, target)
        (target / LOCK).unlink()
    except BaseException:
        # An interruption may come before the lock is ours. Without it the folder may be another process's.
        with contextlib.suppress(OSError):
            lock.acquire()
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release(force=True)
