"""Weight files in safetensors or PyTorch's pickle format, read one tensor at a time."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checks import shown
from ..files import read_json, regular_file
from ..tensor_files import read_tensors
from .errors import LONGEST_NAME, first_few, one_sentence, short_path

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that models compute in, by name."""
_STORED = {
    **{"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": torch.bool,
}
"""dtypes by their names in safetensors."""


def parse_dtype(value: Any) -> torch.dtype | str | None:
    """A `dtype` argument: None, "auto", or one of `DTYPES`, given as a name or as a torch.dtype.

    Raises:
        ValueError: For anything else.
    """
    if value is None or (isinstance(value, torch.dtype) and value in DTYPES.values()):
        return value
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    raise ValueError(f"`dtype` must be one of auto, {', '.join(DTYPES)}, a torch.dtype of these, or None, got {shown(value)}.")


@dataclass
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of one model in one or several weight files. Tensors in safetensors are read only on demand.

    Args:
        files: safetensors, or pickles, which are read with `weights_only=True`: no code in them runs.
        wrapper: Keys under which a pickle may hold its tensors, such as ("model_state_dict",); the first that is present counts,
            and without any the tensors are expected at the top.

    Raises:
        ValueError: If a file is damaged, or a pickle holds anything but tensors.
    """

    def __init__(self, files: Sequence[Path], wrapper: Sequence[str] = ()):
        self.files = list(files)
        self._entries: dict[str, _Entry] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self._open: tuple[Path, Any] | None = None
        for file in self.files:
            if file.suffix in PICKLES:
                tensors = _read_pickle(file, wrapper)
                self._pickled |= tensors
                for key, tensor in tensors.items():
                    self._entries[key] = _Entry(file, tuple(tensor.shape), tensor.dtype)
            else:
                handle = self._handle(file)
                for key in handle.keys():  # noqa: SIM118
                    stored = handle.get_slice(key)
                    name = str(stored.get_dtype())
                    if name not in _STORED:
                        raise ValueError(f"{file}: {key} is stored as {name}, which is not supported.")
                    self._entries[key] = _Entry(file, tuple(stored.get_shape()), _STORED[name])

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            try:
                self._open = regular_file(file), safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a safetensors file, or is damaged: {str(error)[:LONGEST_NAME]}.") from None
        return self._open[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by key."""
        return {key: entry.shape for key, entry in self._entries.items()}

    @property
    def num_elements(self) -> int:
        """The number of elements of all tensors together."""
        return sum(math.prod(entry.shape) for entry in self._entries.values())

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The floating-point dtype of most elements; None if no tensor is floating-point."""
        counts: Counter[torch.dtype] = Counter()
        for entry in self._entries.values():
            if entry.dtype.is_floating_point:
                counts[entry.dtype] += max(1, math.prod(entry.shape))
        return counts.most_common(1)[0][0] if counts else None

    def computing_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype to load a model in: `dtype`, or by default `stored_dtype`, because a model computes in one dtype only.

        Raises:
            ValueError: If no model can compute in the stored one.
        """
        dtype = dtype or self.stored_dtype or torch.float32
        if dtype not in DTYPES.values():
            raise ValueError(
                f"{self.described}: the weights are stored as {dtype}, in which no model here computes: `dtype` must be one of "
                f"{', '.join(DTYPES)}."
            )
        return dtype

    @property
    def described(self) -> str:
        """The names of the files, for errors."""
        return first_few(sorted({short_path(file) for file in self.files}))

    def file_of(self, key: str) -> Path:
        """The file that holds a key."""
        return self._entries[key].file

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        return self._entries[key].dtype

    def empty(self, key: str) -> torch.Tensor:
        """A tensor of the stored shape and dtype on the device "meta"."""
        entry = self._entries[key]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def tensor(self, key: str) -> torch.Tensor:
        """Reads a tensor, in its stored dtype."""
        if key in self._pickled:
            return self._pickled[key]
        return self._handle(self.file_of(key)).get_tensor(key)


@dataclass(frozen=True)
class Combination:
    """A tensor that is made of stored ones.

    Attributes:
        keys: Those that it is made of.
        combine: From them, in this order, the tensor; also on the device "meta", from shapes alone.
    """

    keys: tuple[str, ...]
    combine: Callable[[list[torch.Tensor]], torch.Tensor]


class CombinedCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors are made of several stored ones, or of parts of one. They are read on demand, too.

    Args:
        checkpoint: The stored tensors; those that nothing is made of are there as they are.
        combinations: The others, by their new names.

    Raises:
        ValueError: If the parts of one do not fit together.
    """

    def __init__(self, checkpoint: Checkpoint, combinations: Mapping[str, Combination]):
        self.files = checkpoint.files
        self._stored = checkpoint
        self._combinations = combinations
        used = {key for one in combinations.values() for key in one.keys}
        self._entries = {key: entry for key, entry in checkpoint._entries.items() if key not in used}
        for name, one in combinations.items():
            file = checkpoint.file_of(one.keys[0])
            with one_sentence(f"{short_path(file)}: {first_few(list(one.keys))} do not make up {name}"):
                made = one.combine([checkpoint.empty(key) for key in one.keys])
            self._entries[name] = _Entry(file, tuple(made.shape), made.dtype)

    def tensor(self, key: str) -> torch.Tensor:
        """Reads a tensor, in its stored dtype."""
        if key not in self._combinations:
            return self._stored.tensor(key)
        one = self._combinations[key]
        return one.combine([self._stored.tensor(part) for part in one.keys])


def _read_pickle(file: Path, wrapper: Sequence[str]) -> dict[str, torch.Tensor]:
    content = read_tensors(file)
    for name in wrapper:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not (isinstance(content, dict) and content and all(isinstance(value, torch.Tensor) for value in content.values())):
        expected = f"under one of the keys {', '.join(wrapper)}, or at the top" if wrapper else "at the top"
        found = first_few([str(name) for name in content]) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} must hold named tensors {expected}, got {found}.")
    return dict(content)


def weight_names(stem: str, variant: str | None = None) -> list[str]:
    """Names of weight files as diffusers and transformers choose them, the preferred one first.

    Args:
        stem: "model" for transformers, "diffusion_pytorch_model" for diffusers.
        variant: Such as "fp16", for "model.fp16.safetensors" and "pytorch_model.fp16.bin".
    """
    suffix = f".{variant}" if variant else ""
    pickle_stem = "pytorch_model" if stem == "model" else stem
    return [f"{stem}{suffix}.safetensors", f"{pickle_stem}{suffix}.bin"]


def find_weights(folder: Path, names: Sequence[str], wrapper: Sequence[str] = ()) -> Checkpoint:
    """The weights in a folder: the first of `names` that is present, as one file or as an index of shards.

    Args:
        names: File names, the preferred one first, such as ("model.safetensors", "pytorch_model.bin").
        wrapper: As in `Checkpoint`.

    Raises:
        ValueError: If there is none, or a shard that the index names is missing.
    """
    for name in names:
        if (folder / name).exists():
            return Checkpoint([folder / name], wrapper)
        for index in _index_files(folder, name):
            if index.exists():
                return Checkpoint(_shards(index), wrapper)
    raise ValueError(f"{folder} has no weights: none of {', '.join(names)} (or their .index.json) is there.")


def has_weights(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder has one of these weight files, or an index of its shards."""
    return any(file.exists() for name in names for file in (folder / name, *_index_files(folder, name)))


def _index_files(folder: Path, name: str) -> list[Path]:
    """Possible index files for the shards of a weight file: "model.safetensors.index.fp16.json" for "model.fp16.safetensors"."""
    stem, *variant, suffix = name.split(".")
    names = [f"{stem}.{suffix}.index.{'.'.join(variant)}.json"] if variant else []
    return [folder / index for index in (*names, f"{name}.index.json")]


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: `weight_map` must be an object of file names by tensor, got {type(weight_map).__name__}.")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if Path(shard).name != shard or not os.path.exists(index.parent / shard)]
    if missing or not shards:
        raise ValueError(f"{index} names files that are missing: {first_few(missing) or 'none are named'}.")
    return [index.parent / shard for shard in shards]
