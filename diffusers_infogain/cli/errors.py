"""Turns exceptions into one sentence for the user and an exit code."""

from __future__ import annotations

import argparse
import errno
import re

from ..files import quoted

TRACEBACK = "DIFFUSERS_INFOGAIN_TRACEBACK"
"""The environment variable that, if set, prints the traceback above the sentence."""

USAGE = 2
"""The exit code for what users can fix: flags, files, packages, memory."""
INTERNAL = 70
"""The exit code for a bug in this package."""

_NO_MEMORY = re.compile(r"out of memory|not enough memory|can.?t allocate memory|cannot allocate memory|ALLOC_FAILED", re.I)
_DISK_FULL = re.compile(r"no space left on device|disk quota exceeded", re.I)
_LONGEST = 2000
_LESS_MEMORY = ("lookahead_batch_size", "batch_size", "max_new_tokens", "max_shard_size")
"""Flags whose lower values save memory, the most effective first."""


def one_sentence(text: str) -> str:
    """Joins a message to one line, and truncates a long one."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def explain(error: Exception, args: argparse.Namespace | None) -> tuple[str, int]:
    """The sentence and the exit code for an exception; `args` are the command's flags, or None if they were not parsed."""
    text = one_sentence(str(error))
    if _is_out_of_memory(error):
        return f"out of memory{_less_memory(args)}. ({text or type(error).__name__})", USAGE
    if _is_disk_full(error):
        return f"no space left on the disk for {_written(error, args)}.", USAGE
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {quoted(str(error.filename))}", USAGE
    # safetensors' error has no public base class but Exception; the package need not be there yet.
    if isinstance(error, (ValueError, OSError, ImportError)) or type(error).__name__ == "SafetensorError":
        return text or type(error).__name__, USAGE
    name = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"this is a bug in diffusers-infogain; please report it with the output of {TRACEBACK}=1: {name}", INTERNAL


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (RuntimeError, OSError)):  # torch has a class of its own for accelerators, and none for the CPU
        return _errno(error) == errno.ENOMEM or _NO_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)


def _is_disk_full(error: Exception) -> bool:
    return _errno(error) in (errno.ENOSPC, errno.EDQUOT) or _DISK_FULL.search(str(error)) is not None


def _errno(error: Exception) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _less_memory(args: argparse.Namespace | None) -> str:
    flags = vars(args) if args is not None else {}
    hints = []
    for name in _LESS_MEMORY:
        if name in flags:
            value = flags[name]
            hints.append(f"--{name.replace('_', '-')} ({'not set' if value is None else f'now {value}'})")
    if flags.get("dtype", "") in ("float32", None):
        hints.append("or use --dtype bfloat16")
    return f": lower {', '.join(hints)}" if hints else ""


def _written(error: Exception, args: argparse.Namespace | None) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return quoted(str(error.filename))
    flags = vars(args) if args is not None else {}
    for name, flag in (("output", "--output "), ("target", "")):
        if flags.get(name) is not None:
            return f"{flag}{quoted(str(flags[name]))}"
    return "the output"
