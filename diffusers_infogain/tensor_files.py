"""Files of NumPy arrays and torch tensors: no code of a file is ever run."""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .files import reading, regular_file

ARRAY_LIMIT = 2**28
"""Size limit of an array in an .npz file, in bytes."""


def read_npz(path: str | os.PathLike[str], names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of numbers from an .npz file by name; other arrays of the file are not read.

    Raises:
        ValueError: If the file is no .npz file or damaged, lacks one of `names`, or an array holds objects or more than
            `ARRAY_LIMIT` bytes.
    """
    path = regular_file(path)
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            if not members.keys() >= set(names):
                found = ", ".join(list(members)[:9]) or "nothing"
                raise ValueError(f"{path} must hold `{'` and `'.join(names)}`, got {found}.")
            wanted = [name for name in (*names, *optional) if name in members]
            return {name: _read_array(archive, members[name], f"`{name}` of {path}") for name in wanted}
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is not an .npz file, or is damaged.") from None
    except (EOFError, NotImplementedError, RuntimeError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error or 'it is truncated'}.") from None


def _read_array(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    """One array. Its size is known before anything is decompressed, and no object is ever built."""
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
    """The content of a `torch.save` file that holds tensors only, read with `weights_only=True`.

    Raises:
        ValueError: If it holds more than tensors, or is damaged.
    """
    path = regular_file(path)
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with reading(path):
            try:
                return torch.load(path, mmap=True, **options)
            except RuntimeError:  # files from before torch 1.6 cannot be mapped
                return torch.load(path, **options)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is a pickle that needs code to be read, or is damaged. Only pickles of tensors are read "
            "(torch.load with weights_only=True)."
        ) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the reader interprets the file, and a damaged one can fail at any point
        raise ValueError(f"{path} cannot be read: {str(error).partition(chr(10))[0] or 'it is truncated'}") from None


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: If it is not one, or is damaged.
    """
    path = regular_file(path)
    try:
        with reading(path):
            return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}.") from None
