"""Files are read and written here: written whole or not at all, and read as what strangers may have put there.

Every reader takes regular files only, reads no more than a bound, and raises a ValueError of one sentence that names the file
for whatever is not what it should be; an OSError names the file as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import PIL.Image
import PIL.PngImagePlugin

if TYPE_CHECKING:
    import numpy as np
    import torch

METADATA_KEY = "infogain"
"""Text chunk of a PNG that holds its settings as JSON."""

TEXT_LIMIT = 2**27
"""Bytes of a text file, at most."""
JSON_LIMIT = 2**26
"""Bytes of a JSON file, at most."""
MAX_DEPTH = 64
"""Brackets of JSON inside each other, at most."""
MAX_PIXELS = 2**27
"""Of an image."""
IMAGE_LIMIT = 2**29
"""Bytes of an image file, at most."""
ARRAY_LIMIT = 2**28
"""Bytes of an array in an .npz file, at most."""

_PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
LOCK = ".lock"
"""Name of the file in an output folder by which commands keep out of each other's way."""

_PARTS = re.compile(r"\.[0-9a-f]{16}\.part")


def regular_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file that can be read without waiting for anybody: no folder, pipe or device; links are followed.

    Raises:
        ValueError: If it is none, or missing.
        OSError: If that cannot be found out.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing.") from None
    except OSError as error:
        raise OSError(f"Cannot read {_shown(path)}: {error.strerror}.") from error
    except ValueError:  # a NUL byte
        raise ValueError(f"{str(path)!r} is not the name of a file.") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} must be a file, got {'a folder' if stat.S_ISDIR(mode) else 'a pipe, socket or device'}.")
    return path


def read_bytes(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> bytes:
    """What a regular file holds.

    Raises:
        ValueError: If it is no regular file, or has more than `limit` bytes.
        OSError: If it cannot be read.
    """
    path = regular_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise OSError(f"Cannot read {_shown(path)}: {error.strerror}.") from error
    if len(content) > limit:
        raise ValueError(f"{path} must have at most {limit} bytes, got more.")
    return content


def read_text(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; all ends of lines become newlines.

    Raises:
        ValueError: If it is something else, or as for `read_bytes`.
    """
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: its byte {error.start + 1} fits in nowhere.") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has a NUL byte.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, where: str, kind: type | tuple[type, ...] = dict) -> Any:
    """The value of a JSON text.

    Args:
        where: What the text is, for errors: a file's name, perhaps with a line.
        kind: What the value must be.

    Raises:
        ValueError: If the text is no JSON, its brackets are nested too deeply, or it is of another kind.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where} must have at most {MAX_DEPTH} brackets inside each other, got more.") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not text: it has half of a surrogate pair.") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {str(error).partition(';')[0]}.") from None
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(f"{where} must hold a JSON {' or '.join(map(_named, kinds))}, got {_named(type(value))}.")
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (
            part for one in level if isinstance(one, (dict, list)) for part in (one.values() if isinstance(one, dict) else one)
        )
        level = [part for part in inner if isinstance(part, (dict, list))]
    if level:
        raise ValueError(f"{where} must have at most {MAX_DEPTH} brackets inside each other, got more.")
    return value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _named(kind: type) -> str:
    return {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}.get(kind, kind.__name__)


def read_json(path: str | os.PathLike[str], kind: type | tuple[type, ...] = dict, limit: int = JSON_LIMIT) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: As for `parse_json` and `read_text`.
    """
    return parse_json(read_text(path, limit), str(path), kind)


def read_json_lines(path: str | os.PathLike[str], *, begin: str | None = None, limit: int = TEXT_LIMIT) -> list[dict[str, Any]]:
    """The JSON objects of a file, one on each line; empty lines are left out.

    Args:
        begin: How every record begins, for files to which records are appended: of these a killed run may have left the last
            line unfinished, which is left out.

    Raises:
        ValueError: For a line that is something else, by its number, or as for `read_text`.
    """
    lines = read_text(path, limit).split("\n") if begin is None else whole_lines(Path(path), begin, limit)
    return [parse_json(line, f"Line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]


def check_fields(record: Any, where: str, fields: Mapping[str, Any]) -> None:
    """What was read from a file has these fields.

    Args:
        where: What was read, for errors.
        fields: Per name a type, several in a tuple, or a list of one of these for a list of such values. `float` takes any
            number that is finite, and `int` no boolean.

    Raises:
        ValueError: For what is no object, or the first field that is missing or has another type.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} must hold a JSON object, got {_named(type(record))}.")
    for name, kind in fields.items():
        if name not in record:
            raise ValueError(f"{where} must have the field `{name}`.")
        value, inner = record[name], kind[0] if isinstance(kind, list) else kind
        kinds = inner if isinstance(inner, tuple) else (inner,)
        fits = isinstance(value, list) if isinstance(kind, list) else True
        for one in value if isinstance(kind, list) and fits else [value]:
            fits = fits and any(_is_a(one, allowed) for allowed in kinds)
        if not fits:
            allowed = " or ".join(_named(one) for one in kinds)
            shown = json.dumps(value)
            raise ValueError(
                f"{where} must have {f'a list of {allowed}' if isinstance(kind, list) else allowed} in its field `{name}`, "
                f"got {shown if len(shown) <= 80 else shown[:77] + '...'}."
            )


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, kind)


def whole_lines(path: Path, begin: str, limit: int = TEXT_LIMIT) -> list[str]:
    """The lines of a file to which records are appended, less a last one that a killed run left unfinished.

    Args:
        begin: How every record begins.

    Raises:
        ValueError: If what stands behind the last line's end is no beginning of a record, or as for `read_text`.
    """
    *lines, rest = read_text(path, limit).split("\n")
    if not rest.startswith(begin[: len(rest)]):
        raise ValueError(f"Line {len(lines) + 1} of {path} was not written by this command.")
    return lines


def open_image(path: str | os.PathLike[str], formats: tuple[str, ...] | None = None) -> PIL.Image.Image:
    """An image, decoded to its end.

    Args:
        formats: Pillow's names of those that are taken, such as ("PNG",); None for all.

    Raises:
        ValueError: If it is damaged, of another format or too large, or as for `read_bytes`.
    """
    content = read_bytes(path, IMAGE_LIMIT)
    if content.startswith(_PNG_BEGIN) and _PNG_END not in content[-4096:]:
        raise ValueError(f"{path} is damaged: it is cut off.")
    try:
        with PIL.Image.open(io.BytesIO(content), formats=formats) as image:
            fits = math.prod(image.size) <= MAX_PIXELS
            if fits:
                image.load()
    except PIL.UnidentifiedImageError:
        kind = f"a {' or '.join(formats)} image" if formats else "an image"
        raise ValueError(f"{path} is not {kind}, or is damaged.") from None
    except PIL.Image.DecompressionBombError:
        fits = False
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not fits:
        raise ValueError(f"{path} must have at most {MAX_PIXELS} pixels, got more.")
    return image


def read_png_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that `save_png` wrote into a PNG, which has to be readable to its end.

    Raises:
        ValueError: If it is not, or holds none, or as for `parse_json`.
    """
    text = open_image(path, ("PNG",)).info.get(METADATA_KEY)
    if not isinstance(text, str):
        raise ValueError(f"{path} does not say how it was made: it has no text chunk {METADATA_KEY!r}.")
    return parse_json(text, f"The text chunk {METADATA_KEY!r} of {path}")


def read_npz(path: str | os.PathLike[str], names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of numbers by name from an .npz file; of the others nothing is read.

    Raises:
        ValueError: If the file is no .npz file or damaged, lacks one of `names`, or an array holds objects or more than
            `ARRAY_LIMIT` bytes.
    """
    path = regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy"): name for name in archive.namelist()}
            missing = [name for name in names if name not in found]
            if missing:
                raise ValueError(f"{path} must hold `{'` and `'.join(names)}`, got {', '.join(list(found)[:9]) or 'nothing'}.")
            return {
                name: _read_array(archive, found[name], f"`{name}` of {path}") for name in (*names, *optional) if name in found
            }
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is not an .npz file, or is damaged.") from None
    except OSError as error:
        raise OSError(f"Cannot read {_shown(path)}: {error.strerror or error}.") from error
    except (EOFError, NotImplementedError, RuntimeError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error or 'it is cut off'}.") from None


def _read_array(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    """One array; its size is known before anything is unpacked, and no object is ever built."""
    import numpy as np

    size = archive.getinfo(name).file_size
    if size > ARRAY_LIMIT:
        raise ValueError(f"{where} must have at most {ARRAY_LIMIT} bytes, got {size}.")
    content = archive.read(name)
    file = io.BytesIO(content)
    try:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, columns_first, dtype = readers[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError, EOFError, struct.error):
        raise ValueError(f"{where} is not an array, or is damaged.") from None
    if dtype.kind not in "biuf":
        raise ValueError(f"{where} must hold numbers, got the type {dtype}; pickled objects (allow_pickle) are never read.")
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{where} is damaged: its size does not fit its shape {shape}.")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if columns_first else "C")


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """What a file of torch.save holds, by the reader that runs no code (`weights_only=True`).

    Raises:
        ValueError: If reading it would take code, or it is damaged.
    """
    import pickle

    import torch

    path = regular_file(path)
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            return torch.load(path, mmap=True, **options)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped
            return torch.load(path, **options)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is a pickle that needs code to be read, or is damaged. Only pickles of tensors are read "
            "(torch.load with weights_only=True)."
        ) from None
    except OSError as error:
        raise OSError(f"Cannot read {_shown(path)}: {error.strerror or error}.") from error
    except MemoryError:
        raise
    except Exception as error:  # the reader interprets the file, and a damaged one can fail in any of its steps
        raise ValueError(f"{path} cannot be read: {str(error).partition(chr(10))[0] or 'it is cut off'}") from None


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: If it is none, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = regular_file(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}.") from None
    except OSError as error:
        raise OSError(f"Cannot read {_shown(path)}: {error.strerror or error}.") from error


def _shown(path: Path) -> str:
    text = repr(str(path))
    return text if len(text) <= 300 else f"{text[:300]}..."


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in the errors of the disk: full, read-only, not permitted, a name too long.

    Raises:
        OSError: In place of one that names nothing.
    """
    try:
        yield
    except OSError as error:
        named = OSError(f"Cannot write {_shown(Path(path))}: {error.strerror or error}.")
        named.errno = error.errno
        raise named from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends without an exception.

    A new file has the rights that the umask leaves, and one that is replaced keeps its own.

    Raises:
        ValueError: If a folder, pipe or device is there.
        OSError: If the file cannot be written, naming it.
    """
    with writing(path):
        rights = stat.S_IMODE(regular_file(path).stat().st_mode) if path.exists() else None
        part = path.parent / f".{secrets.token_hex(8)}.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
            if rights is not None:
                part.chmod(rights)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def save_text(text: str, path: Path) -> None:
    """Writes a UTF-8 text file in one go."""
    with replacing(path) as file:
        file.write(text.encode())


def save_json(value: Any, path: Path) -> None:
    """Writes a JSON file in one go; NaN and infinities are refused, since other readers refuse them."""
    save_text(json.dumps(value, indent=1, allow_nan=False) + "\n", path)


def append_json_lines(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Appends records to a file of JSON lines; what a kill leaves of them is for `cut_unfinished` to mend.

    Raises:
        OSError: If they cannot be written, naming the file.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(lines)


def cut_unfinished(path: Path, begin: str) -> None:
    """Cuts off the last line of a file of JSON lines, if there is one and a killed run left it unfinished.

    Args:
        begin: How every record begins.

    Raises:
        ValueError: As for `whole_lines`.
    """
    if not path.exists():
        return
    whole_lines(path, begin)
    with writing(path):
        os.truncate(path, read_bytes(path).rfind(b"\n") + 1)


def png_information(metadata: str) -> PIL.PngImagePlugin.PngInfo:
    """What Pillow writes into a PNG: `metadata`, JSON, in the text chunk "infogain"."""
    information = PIL.PngImagePlugin.PngInfo()
    information.add_text(METADATA_KEY, metadata)
    return information


def save_png(image: PIL.Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a PNG in one go, with `metadata` as JSON in its text chunk "infogain"."""
    with replacing(path) as file:
        image.save(file, "PNG", pnginfo=png_information(json.dumps(metadata, allow_nan=False)))


def unused(path: Path, same: Callable[[Path], bool]) -> Path:
    """The first of a.png, a-2.png, a-3.png, ... that is not there, or of which `same` says that it may be written again.

    Args:
        same: Whether a file is of the very thing that is to be written; one that raises a ValueError is not.
    """
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        with contextlib.suppress(ValueError):
            if not os.path.lexists(candidate) or same(candidate):
                return candidate
    raise AssertionError


def digest(paths: Iterable[Path]) -> str:
    """The first half of the SHA-256 of the files' contents, one after the other."""
    content = hashlib.sha256()
    for path in paths:
        with regular_file(path).open("rb") as file:
            while block := file.read(2**20):
                content.update(block)
    return content.hexdigest()[:32]


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
        raise OSError(f"Cannot write to the output folder {_shown(path)}: {error.strerror}.") from error
    except ValueError:  # a NUL byte
        raise ValueError(f"{str(path)!r} is not the name of a folder.") from None
    return path


@contextmanager
def owned(output: Path, *, folder: bool = True, main: bool = True) -> Iterator[None]:
    """Keeps other commands away from an output folder, or a file, until the block ends or the process does, however it does.

    A folder is made, and what killed commands left of files they were writing is removed from it.

    Args:
        folder: Whether the output is a folder; else a file.
        main: Whether this is the one process of its command that has to own the output; the others go on as if they did.

    Raises:
        ValueError: If another command writes there now.
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
            while not path.exists():  # its last owner removed it just before
                lock.release()
                lock.acquire()
        except Timeout:
            raise ValueError(
                f"Another command is writing to {output}: wait until it has ended, or choose another output."
            ) from None
    try:
        if folder:
            _remove_parts(home)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still ours
        lock.release()


def _remove_parts(home: Path) -> None:
    """Removes what killed commands left of files they were writing, but not from folders that have owners of their own."""
    for place, folders, names in os.walk(home):
        folders[:] = [name for name in folders if not Path(place, name, LOCK).exists()]
        for name in filter(_PARTS.fullmatch, names):
            Path(place, name).unlink(missing_ok=True)
