"""Files that are either whole or not there: an interrupted run leaves no half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import PIL.Image
import PIL.PngImagePlugin

METADATA_KEY = "infogain"
"""Text chunk of a PNG that holds its settings as JSON."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an exception."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_text(text: str, path: Path) -> None:
    """Writes a UTF-8 text file in one go."""
    with replacing(path) as file:
        file.write(text.encode())


def whole_lines(path: Path, begin: str) -> list[str]:
    """The lines of a file to which records are appended, less a last one that a killed run left unfinished.

    Args:
        begin: How every record begins.

    Raises:
        ValueError: If what stands behind the last line's end is no beginning of a record.
    """
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    if not rest.startswith(begin[: len(rest)]):
        raise ValueError(f"Line {len(lines) + 1} of {path} was not written by this command.")
    return lines


def save_json(value: Any, path: Path) -> None:
    """Writes a JSON file in one go; NaN and infinities are refused, since other readers refuse them."""
    save_text(json.dumps(value, indent=1, allow_nan=False) + "\n", path)


def save_png(image: PIL.Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Writes a PNG in one go, with `metadata` as JSON in its text chunk "infogain"."""
    information = PIL.PngImagePlugin.PngInfo()
    information.add_text(METADATA_KEY, json.dumps(metadata))
    with replacing(path) as file:
        image.save(file, "PNG", pnginfo=information)


def writable_folder(path: Path) -> Path:
    """Makes the folder, and finds out before hours of work whether files can be written there.

    Raises:
        OSError: If they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"Cannot write to the output folder {str(path)!r}: {error.strerror}.") from error
    return path
