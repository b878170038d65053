"""Errors of libraries, files and the operating system as one sentence each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..files import writing

_NAMED = 5
_LONGEST = 600
LONGEST_NAME = 120


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block, be it in a library, becomes one ValueError that begins with `what`.

    Lack of memory, of a package or of a file is left as it is, and so is an error that names `what` already.
    """
    try:
        yield
    except (MemoryError, ImportError, OSError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # Panics of tokenizers, which is written in Rust, are no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if (isinstance(error, ValueError) and what in str(error)) or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:_LONGEST].rstrip(".") or "no reason given"
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{reason}.") from error


@contextmanager
def writing_natively(path: Path) -> Iterator[None]:
    """As `files.writing`, for libraries in Rust, which report the operating system's errors as their own.

    Raises:
        OSError: If the disk is full or cannot be written, naming the file or folder.
    """
    with writing(path):
        try:
            yield
        except Exception as error:
            code = re.search(r"os error (\d+)", str(error))
            if isinstance(error, OSError) or code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def short_path(file: Path) -> str:
    """A file as errors call it, with its folder: the components of a pipeline have files of one name."""
    return f"{file.parent.name}/{file.name}"


def first_few(names: Sequence[str]) -> str:
    """The first of the names, for an error."""
    return ", ".join(name[:LONGEST_NAME] for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
