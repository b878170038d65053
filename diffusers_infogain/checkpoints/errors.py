"""Turns errors of libraries and of the operating system into one sentence that names the file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..files import writing

_MOST_NAMES = 5
_LONGEST_REASON = 600
LONGEST_NAME = 120


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Converts any error in the block, including those of libraries, to one ValueError that begins with `what`.

    Errors about memory, missing packages and missing files pass unchanged, as do those that name `what` already.
    """
    try:
        yield
    except (MemoryError, ImportError, OSError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # The tokenizers library is written in Rust; its panics are not an `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if (isinstance(error, ValueError) and what in str(error)) or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:_LONGEST_REASON].rstrip(".") or "no reason given"
        error_type = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {error_type}{reason}.") from error


@contextmanager
def writing_natively(path: Path) -> Iterator[None]:
    """As `files.writing`, for libraries written in Rust, which wrap errors of the operating system in their own.

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
    """A file with its folder, for errors: weight files of different components have the same name."""
    return f"{file.parent.name}/{file.name}"


def first_few(names: Sequence[str]) -> str:
    """The first names of a list, shortened to fit into an error."""
    return ", ".join(name[:LONGEST_NAME] for name in names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
