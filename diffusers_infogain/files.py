"""Text and JSON files: written atomically, and read without trusting what is in them.

Every reader here, in `image_files` and in `tensor_files` takes regular files only and reads no more than a limit. Whatever is
wrong with a file's content is a ValueError of one sentence that names the file; an OSError names it too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

TEXT_LIMIT = 2**27
"""Size limit of text files, in bytes."""
JSON_LIMIT = 2**26
"""Size limit of JSON files, in bytes."""
MAX_DEPTH = 64
"""How deeply JSON may be nested."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises an OSError that names the file in place of one from the disk."""
    with _named("read", path):
        yield


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises an OSError that names the file in place of one from the disk."""
    with _named("write", path):
        yield


@contextmanager
def _named(verb: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """For a full or read-only disk, missing permissions, a name that is too long, ..."""
    try:
        yield
    except OSError as error:
        named = OSError(f"Cannot {verb} {quoted(path)}: {error.strerror or error}.")
        named.errno = error.errno
        raise named from error


def quoted(path: str | os.PathLike[str]) -> str:
    """A path for a message, cut off if it is very long."""
    text = repr(os.fspath(path))
    return text if len(text) <= 300 else f"{text[:300]}..."


def local_path(name: str | os.PathLike[str]) -> Path:
    """The name as a path, whether or not it exists.

    Raises:
        OSError: If that cannot be found out, for example because the name is too long, or if it is empty.
    """
    if not os.fspath(name):  # `Path` would take it for the current folder
        raise OSError("The name of a file or folder must not be empty, got ''.")
    path = Path(name)
    with reading(path), contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        path.stat()  # `exists` differs between versions of Python: some raise such errors, and some return False
    return path


def regular_file(path: str | os.PathLike[str]) -> Path:
    """The path of a regular file, or of a link to one: pipes and devices could block or never end.

    Raises:
        ValueError: If it is something else, or missing.
        OSError: If that cannot be found out.
    """
    path = Path(path)
    with reading(path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path} is missing.") from None
        except ValueError:  # a NUL byte
            raise ValueError(f"{str(path)!r} is not a valid file name.") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} must be a file, got {'a folder' if stat.S_ISDIR(mode) else 'a pipe, socket or device'}.")
    return path


def read_bytes(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file.

    Raises:
        ValueError: If it is no regular file, or has more than `limit` bytes.
        OSError: If it cannot be read.
    """
    path = regular_file(path)
    with reading(path), path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} must have at most {limit} bytes, got more.")
    return content


def read_text(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; line endings become newlines.

    Raises:
        ValueError: If it is not UTF-8, or contains a NUL byte, or as `read_bytes`.
    """
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start + 1} is invalid.") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it contains a NUL byte.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, where: str, kind: type | tuple[type, ...] = dict) -> Any:
    """The value of a JSON text.

    Args:
        where: What the text is, for errors: a file's name, perhaps with a line number.
        kind: What type the value must have.

    Raises:
        ValueError: If the text is not JSON, is nested too deeply, or has a value of another type.
    """
    too_deep = ValueError(f"{where} must be nested at most {MAX_DEPTH} levels deep, got more.")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise too_deep from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not text: it contains an unpaired surrogate.") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {str(error).partition(';')[0]}.") from None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds):
        raise ValueError(f"{where} must hold a JSON {' or '.join(map(_json_name, kinds))}, got {_json_name(type(value))}.")
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    if containers:
        raise too_deep
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _json_name(kind: type) -> str:
    return {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}.get(kind, kind.__name__)


def read_json(path: str | os.PathLike[str], kind: type | tuple[type, ...] = dict, limit: int = JSON_LIMIT) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: As `parse_json` and `read_text`.
    """
    return parse_json(read_text(path, limit), str(path), kind)


def read_json_lines(path: str | os.PathLike[str], *, begin: str | None = None, limit: int = TEXT_LIMIT) -> list[dict[str, Any]]:
    """The JSON objects of a file with one on each line; empty lines are skipped.

    Args:
        begin: How every record begins, for files that records are appended to: a last line that a killed run left unfinished
            is then skipped.

    Raises:
        ValueError: For a line that is something else, with its number, or as `read_text`.
    """
    lines = read_text(path, limit).split("\n") if begin is None else whole_lines(Path(path), begin, limit)
    return [parse_json(line, f"Line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]


def whole_lines(path: Path, begin: str, limit: int = TEXT_LIMIT) -> list[str]:
    """The lines of a file that records are appended to, without a last one that a killed run left unfinished.

    Args:
        begin: How every record begins.

    Raises:
        ValueError: If what follows the last newline is not the beginning of a record, or as `read_text`.
    """
    *lines, rest = read_text(path, limit).split("\n")
    if not rest.startswith(begin[: len(rest)]):
        raise ValueError(f"Line {len(lines) + 1} of {path} was not written by this command.")
    return lines


def check_fields(record: Any, where: str, fields: Mapping[str, Any]) -> None:
    """Checks the fields of an object that was read from a file.

    Args:
        where: What was read, for errors.
        fields: For each name a type, a tuple of types, or a list with one of these for a list of such values. `float` takes any
            finite number, and `int` no boolean.

    Raises:
        ValueError: If it is no object, or for the first field that is missing or has another type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} must hold a JSON object, got {_json_name(type(record))}.")
    for name, kind in fields.items():
        if name not in record:
            raise ValueError(f"{where} must have the field `{name}`.")
        value, is_list = record[name], isinstance(kind, list)
        inner = kind[0] if is_list else kind
        kinds = inner if isinstance(inner, tuple) else (inner,)
        values = value if is_list and isinstance(value, list) else [value]
        fits = isinstance(value, list) or not is_list
        if not fits or not all(any(_is_a(item, allowed) for allowed in kinds) for item in values):
            expected = " or ".join(map(_json_name, kinds))
            found = json.dumps(value)
            raise ValueError(
                f"{where} must have {f'a list of {expected}' if is_list else expected} in its field `{name}`, "
                f"got {found if len(found) <= 80 else found[:77] + '...'}."
            )


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, kind)


def digest(paths: Iterable[Path]) -> str:
    """The first half of the SHA-256 of the files' concatenated contents."""
    content = hashlib.sha256()
    for path in paths:
        with regular_file(path).open("rb") as file:
            while block := file.read(2**20):
                content.update(block)
    return content.hexdigest()[:32]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an exception.

    A new file gets the permissions of the umask; one that is replaced keeps its own.

    Raises:
        ValueError: If `path` is a folder, pipe or device.
        OSError: If the file cannot be written, naming it.
    """
    with writing(path):
        permissions = stat.S_IMODE(regular_file(path).stat().st_mode) if path.exists() else None
        part = path.parent / f".{secrets.token_hex(8)}.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
            if permissions is not None:
                part.chmod(permissions)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def save_text(text: str, path: Path) -> None:
    """Writes a UTF-8 text file atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def save_json(value: Any, path: Path) -> None:
    """Writes a JSON file atomically; NaN and infinities, which other readers refuse, are a ValueError."""
    save_text(json.dumps(value, indent=1, allow_nan=False) + "\n", path)


def append_json_lines(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Appends records to a file of JSON lines; if the process is killed meanwhile, `cut_unfinished` repairs the file.

    Raises:
        OSError: If they cannot be written, naming the file.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(lines)


def cut_unfinished(path: Path, begin: str) -> None:
    """Removes the last line of a file of JSON lines, if the file exists and a killed run left that line unfinished.

    Args:
        begin: How every record begins.

    Raises:
        ValueError: As `whole_lines`.
    """
    if not path.exists():
        return
    whole_lines(path, begin)
    with writing(path):
        os.truncate(path, read_bytes(path).rfind(b"\n") + 1)
