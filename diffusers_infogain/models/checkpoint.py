"""Public checkpoints, read one tensor at a time: checked key by key, loaded into a model, or written in safetensors."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import os
import re
import typing
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from ..checks import shown
from ..files import read_json, read_tensors, regular_file, save_json, writing

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SHARD_SIZE = 5 * 10**9
"""Bytes of a weight file, at most; larger models are split."""

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What models compute in, by name."""

_NAMED = 5
_LONGEST = 600
_LONGEST_NAME = 120
_STORED = {
    **{"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": torch.bool,
}
"""dtypes by their names in safetensors."""

_UNHEEDED = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
_REPEATED = re.compile(r"layer|block|label|depth|expert")
_SIZED = re.compile(r"size|dim|length|channels|vocab|token")
_LARGEST_COUNT = 4096
_LARGEST_TABLE = 2**24
_LARGEST_BUFFER = 10**8


def local_folder(
    repository: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of that name, or a download of those files of a Hub repository.

    Args:
        repository: A folder, or a Hub id.
        patterns: File names, with wildcards, that are needed.
        revision, cache_dir, token, local_files_only: As in `huggingface_hub.snapshot_download`.

    Raises:
        OSError: If there is no such folder and nothing of that name can be downloaded.
    """
    if Path(repository).is_dir():
        return Path(repository)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    try:
        return Path(snapshot_download(os.fspath(repository), allow_patterns=list(patterns), **where))
    except (HFValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{os.fspath(repository)!r} is neither a folder nor a Hub repository that can be read: {reason}") from error


def own_fields(kind: type, file: Path) -> dict[str, Any]:
    """Those fields of a config.json that are arguments of the class.

    Raises:
        ValueError: If one is of another type.
    """
    config = read_json(file)
    check_fields(kind, config, file)
    names = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    return {name: value for name, value in config.items() if name in names}


def parse_dtype(value: Any) -> torch.dtype | str | None:
    """A dtype as loaders take it: None, "auto", or one of `DTYPES` by name or itself.

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


@dataclass
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of one model in one or several weight files, none of them read before it is asked for.

    Args:
        files: safetensors, or pickles, which are read with `weights_only=True`: no code in them runs.
        wrapper: Keys of nested dictionaries that lead to the tensors of a pickle, such as ("model_state_dict",); the first of
            several alternatives that is there.

    Raises:
        ValueError: If a file is damaged, or is a pickle of more than tensors.
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
                        raise ValueError(f"{file}: {key} is stored as {name}, which is not read here.")
                    self._entries[key] = _Entry(file, tuple(stored.get_shape()), _STORED[name])

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            try:
                self._open = regular_file(file), safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a safetensors file, or is damaged: {str(error)[:_LONGEST_NAME]}.") from None
        return self._open[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key."""
        return {key: entry.shape for key, entry in self._entries.items()}

    @property
    def num_elements(self) -> int:
        """Of all tensors together."""
        return sum(math.prod(entry.shape) for entry in self._entries.values())

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The floating-point dtype that most elements have; None if there is none."""
        counts: Counter[torch.dtype] = Counter()
        for entry in self._entries.values():
            if entry.dtype.is_floating_point:
                counts[entry.dtype] += max(1, math.prod(entry.shape))
        return counts.most_common(1)[0][0] if counts else None

    def computing_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The one that a model is loaded in: `dtype`, or by default the one that is stored, or most of several: a model cannot
        compute in several.

        Raises:
            ValueError: If nothing is computed in the stored one.
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
        """The names of the files."""
        return some(sorted({named(file) for file in self.files}))

    def file_of(self, key: str) -> Path:
        """The file that holds a key."""
        return self._entries[key].file

    def dtype_of(self, key: str) -> torch.dtype:
        """How a key is stored."""
        return self._entries[key].dtype

    def tensor(self, key: str) -> torch.Tensor:
        """Reads a tensor."""
        if key in self._pickled:
            return self._pickled[key]
        return self._handle(self.file_of(key)).get_tensor(key)


def _read_pickle(file: Path, wrapper: Sequence[str]) -> dict[str, torch.Tensor]:
    content = read_tensors(file)
    for name in wrapper:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not (isinstance(content, dict) and content and all(isinstance(value, torch.Tensor) for value in content.values())):
        expected = f"under one of the keys {', '.join(wrapper)}, or at the top" if wrapper else "at the top"
        found = ", ".join(map(str, list(content)[:_NAMED])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} must hold named tensors {expected}, got {found}.")
    return dict(content)


def weight_names(stem: str, variant: str | None = None) -> list[str]:
    """File names of weights, the preferred one first: "model.fp16.safetensors", or "model.safetensors" and
    "pytorch_model.bin"."""
    middle, pickle_stem = f".{variant}" if variant else "", "pytorch_model" if stem == "model" else stem
    return [f"{stem}{middle}.safetensors", f"{pickle_stem}{middle}.bin"]


def find_weights(folder: Path, names: Sequence[str], wrapper: Sequence[str] = ()) -> Checkpoint:
    """The weights in a folder: the first of `names` that is there, whole or as an index of shards.

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
    """Whether `find_weights` would find a file."""
    return any(file.exists() for name in names for file in (folder / name, *_index_files(folder, name)))


def _index_files(folder: Path, name: str) -> list[Path]:
    """Where the index of a weight file's shards can be: "model.fp16.safetensors" has "model.safetensors.index.fp16.json"."""
    stem, *variant, suffix = name.split(".")
    names = [f"{stem}.{suffix}.index.{'.'.join(variant)}.json"] if variant else []
    return [folder / one for one in (*names, f"{name}.index.json")]


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: `weight_map` must be an object of file names by tensor, got {type(weight_map).__name__}.")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if Path(shard).name != shard or not os.path.exists(index.parent / shard)]
    if missing or not shards:
        raise ValueError(f"{index} names files that are missing: {some(missing) or 'none are named'}.")
    return [index.parent / shard for shard in shards]


def _same_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _same_key(key: str) -> str | None:
    return key


@dataclass
class ModelSource:
    """A model in a public checkpoint, and how its tensors become ours.

    Attributes:
        checkpoint: Where they are.
        build: Makes the model; only ever called without memory for its weights.
        probe: Runs the model on some fixed input; before and after a conversion this must give the same.
        convert_key: A key's name in the model, or None for a tensor that the model has no use for.
        convert_tensor: A tensor's value in the model, from its name there and its stored value.
    """

    checkpoint: Checkpoint
    build: Callable[[], Any]
    probe: Callable[[Any], torch.Tensor]
    convert_key: Callable[[str], str | None] = _same_key
    convert_tensor: Callable[[str, torch.Tensor], torch.Tensor] = _same_tensor

    @functools.cached_property
    def skeleton(self) -> Any:
        """The model without memory for its weights.

        Raises:
            ValueError: If the configuration makes no model, or one of far more tensors than the checkpoint has.
        """
        return build_skeleton(self.build, self.checkpoint)

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """Every tensor of the model that is in the checkpoint, by name, and the key that it comes from.

        Raises:
            ValueError: For a key that the model does not have, one that is missing, or one of another shape or kind.
        """
        expected = self.skeleton.state_dict()
        kind, shapes = type(self.skeleton).__name__, self.checkpoint.shapes
        found: dict[str, str] = {}
        for key in shapes:
            name = self.convert_key(key)
            if name is not None and found.setdefault(name, key) != key:
                raise ValueError(
                    f"{named(self.checkpoint.file_of(key))}: {found[name]} and {key} are the same tensor of a {kind}."
                )
        extra = [key for name, key in found.items() if name not in expected]
        if extra:
            file = named(self.checkpoint.file_of(extra[0]))
            raise ValueError(f"{file} has {len(extra)} keys that a {kind} does not have: {some(extra)}.")
        check_tensors(self.skeleton, self.checkpoint, found, self.convert_tensor)
        return found

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every tensor of the model that is in the checkpoint, file by file.

        Args:
            dtype: Of floating-point tensors, except those that the model keeps in float32; by default as stored, or where the
                checkpoint has several, that of the most elements.
        """
        float32 = set(getattr(self.skeleton, "_keep_in_fp32_modules", None) or ())
        dtype = self.checkpoint.computing_dtype(dtype)
        order = {file: place for place, file in enumerate(self.checkpoint.files)}
        for name, key in sorted(self.keys.items(), key=lambda item: order[self.checkpoint.file_of(item[1])]):
            tensor = self.convert_tensor(name, self.checkpoint.tensor(key))
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if float32 & set(name.split(".")) else dtype)
            yield name, tensor

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The model with its weights, in evaluation mode; its memory and one tensor more are all that is needed."""
        _ = self.keys  # before anything is read
        # Unlike `skeleton`, with the values of buffers that are no part of a checkpoint; ties are lost on the way.
        with init_empty_weights(include_buffers=False):
            model = self.build()
        for name, tensor in self.tensors(dtype):
            model.load_state_dict({name: tensor}, strict=False, assign=True)
        for names in tied_names(self.skeleton):
            first, *others = (name for name in self.keys if name in names)
            for name in others:
                if not torch.equal(model.get_parameter(name), model.get_parameter(first)):
                    raise ValueError(
                        f"{self.checkpoint.described}: {self.keys[first]} and {self.keys[name]} are one tensor of a "
                        f"{type(model).__name__}, but differ."
                    )
            for name in names - {first}:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, model.get_parameter(first))
        return model.eval().requires_grad_(False)

    def write(self, folder: Path, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> int:
        """Writes the model as `save_pretrained` does, one shard in memory at a time; returns the bytes written.

        Args:
            folder: Exists and is empty.

        Raises:
            OSError: If it cannot be written, naming the file.
        """
        model = self.skeleton
        stem = "diffusion_pytorch_model" if hasattr(model, "save_config") else "model"
        with writing_natively(folder / "config.json"):
            if hasattr(model, "save_config"):
                model.save_config(folder)
            else:
                model.config.architectures = [type(model).__name__]
                model.config.dtype = self.checkpoint.computing_dtype(dtype)
                model.config.save_pretrained(folder)
        # Of tied names, which are one tensor, the first that is there is written.
        repeated = {name for names in tied_names(model) for name in [one for one in self.keys if one in names][1:]}
        shards: list[list[str]] = []
        pending: dict[str, torch.Tensor] = {}
        pending_bytes = total = 0

        def flush() -> None:
            if pending:
                file = folder / f"{stem}-{len(shards) + 1:05d}.safetensors"
                with writing_natively(file):
                    save_file(pending, file, metadata={"format": "pt"})
                    # The library lets nobody but the owner read its files. The folder has what the umask leaves.
                    file.chmod(folder.stat().st_mode & 0o666)
                shards.append(list(pending))
                pending.clear()

        for name, tensor in self.tensors(dtype):
            if name in repeated:
                continue
            size = tensor.numel() * tensor.element_size()
            if pending and pending_bytes + size > shard_size:
                flush()
                pending_bytes = 0
            pending[name] = tensor.contiguous()
            pending_bytes, total = pending_bytes + size, total + size
            del tensor
        flush()
        if len(shards) == 1:
            (folder / f"{stem}-00001.safetensors").rename(folder / f"{stem}.safetensors")
            return total
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            final = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"{stem}-{number:05d}.safetensors").rename(folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        save_json(index, folder / f"{stem}.safetensors.index.json")
        return total


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


def tied_names(model: torch.nn.Module) -> list[set[str]]:
    """Groups of names that are one parameter, by the model as built and by what its class says."""
    named = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, set[str]] = {}
    for name, value in named.items():
        groups.setdefault(id(value), set()).add(name)
    # transformers ties them when it loads; without memory for weights they are still apart.
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in named and source in named and groups[id(named[target])] is not groups[id(named[source])]:
            group = groups[id(named[target])] | groups[id(named[source])]
            for name in group:
                groups[id(named[name])] = group
    unique = {id(group): group for group in groups.values() if len(group) > 1}
    return list(unique.values())


def computed_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that the class fills in itself when it is built, such as positions and frequencies.

    Those of batch norms, which were measured in training, are not among them.
    """
    measured = tuple(name for name, module in model.named_modules() if isinstance(module, _NormBase))
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in buffers if name.rpartition(".")[0] not in measured}


def missing_tensors(model: torch.nn.Module, found: Container[str]) -> list[str]:
    """Names of what a model needs and a checkpoint with these names lacks: of tied names any one is enough, and what the class
    computes or says it can do without is not needed."""
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    groups = {name: names for names in tied_names(model) for name in names}
    there = {name for names in groups.values() if any(name in found for name in names) for name in names}
    computed, missing = computed_buffers(model), []
    for name in model.state_dict():
        if name in found or name in there or name in computed or any(pattern.search(name) for pattern in optional):
            continue
        there |= groups.get(name, set())  # named once
        missing.append(name)
    return missing


def check_tensors(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    found: Mapping[str, str],
    convert_tensor: Callable[[str, torch.Tensor], torch.Tensor] = _same_tensor,
) -> None:
    """Makes sure that a checkpoint has everything that a model needs.

    Args:
        model: The model, without memory for its weights.
        found: By name of a tensor in the model, its key in the checkpoint.
        convert_tensor: As in `ModelSource`.

    Raises:
        ValueError: For a tensor that is missing, has another shape, or holds no real numbers where the model has some.
    """
    kind, shapes = type(model).__name__, checkpoint.shapes
    missing = missing_tensors(model, found)
    if missing:
        raise ValueError(f"{checkpoint.described}: {len(missing)} tensors of the {kind} are missing: {some(missing)}.")
    for name, expected in model.state_dict().items():
        if name not in found:
            continue
        key = found[name]
        file, dtype = named(checkpoint.file_of(key)), checkpoint.dtype_of(key)
        with one_sentence(f"{file}: {key} does not fit this {kind}"):
            shape = tuple(convert_tensor(name, torch.empty(shapes[key], device="meta")).shape)
        if shape != tuple(expected.shape):
            raise ValueError(f"{file}: {key} must have the shape {tuple(expected.shape)} for this {kind}, got {shape}.")
        if expected.is_floating_point() and not dtype.is_floating_point:
            raise ValueError(f"{file}: {key} must hold floating-point numbers for this {kind}, got {dtype}.")
    for name, buffer in computed_buffers(model).items():
        if name not in found and buffer.numel() > _LARGEST_BUFFER:
            where = checkpoint.files[0].parent / "config.json"
            raise ValueError(f"{where}: the {kind}'s {name} would have the shape {tuple(buffer.shape)}, which is too large.")


class _Counted(TorchFunctionMode):
    """Makes tensors on the device "meta", and stops a model that makes far more of them than a checkpoint holds."""

    def __init__(self, limit: int, complaint: str):
        super().__init__()
        self.left, self.complaint = limit, complaint

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts the call."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(self.complaint)
        return func(*args, **(kwargs or {}))


def build_skeleton(build: Callable[[], Any], checkpoint: Checkpoint) -> Any:
    """A model without memory for its weights, built only as far as a checkpoint can fill it.

    Raises:
        ValueError: If the configuration makes no model, or one of far more tensors than the checkpoint has.
    """
    config, count = checkpoint.files[0].parent / "config.json", len(checkpoint.shapes)
    where = config if config.exists() else checkpoint.files[0]
    complaint = f"{where} describes a model of far more tensors than the {count} of {checkpoint.described}."
    # Models make a handful of calls for each of their tensors.
    with one_sentence(f"{where} makes no model"), torch.device("meta"), _Counted(10_000 + 100 * count, complaint):
        return build()


def check_sizes(settings: Mapping[str, Any], checkpoint: Checkpoint, file: Path) -> None:
    """Refuses numbers of a config.json that no model of these weights has, before anything is made of them.

    Classes of transformers make lists and tables of so many entries when they read a configuration.

    Raises:
        ValueError: For the first such number.
    """
    count, elements = len(checkpoint.shapes), checkpoint.num_elements
    largest = max(_LARGEST_COUNT, count)
    for name, value in _numbers(settings):
        if abs(value) >= 2**63:
            raise ValueError(f"{file}: `{name}` must be an integer of 64 bits, got {shown(value)}.")
        if not 0 <= value <= largest and _REPEATED.search(name) and not _SIZED.search(name):
            raise ValueError(
                f"{file}: `{name}` must be from 0 to {largest} for the {count} tensors of {checkpoint.described}, got {value}."
            )
        if value > max(_LARGEST_TABLE, elements) and "theta" not in name:
            raise ValueError(
                f"{file}: `{name}` must be at most {max(_LARGEST_TABLE, elements)} for the {elements} numbers of "
                f"{checkpoint.described}, got {value}."
            )
    positions, width = settings.get("max_position_embeddings"), settings.get("hidden_size")
    if isinstance(positions, int) and isinstance(width, int) and positions * width > max(_LARGEST_TABLE, 64 * elements):
        raise ValueError(
            f"{file}: `max_position_embeddings` {positions} is too large for the {elements} numbers of {checkpoint.described}."
        )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All integers in a JSON value, with the name of the field that they stand in."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def named(file: Path) -> str:
    """A file as errors call it, with its folder: the components of a pipeline have files of one name."""
    return f"{file.parent.name}/{file.name}"


def some(names: Sequence[str]) -> str:
    """The first of the names, for an error."""
    return ", ".join(name[:_LONGEST_NAME] for name in names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def require_fields(config: Mapping[str, Any], expected: Mapping[str, Any], file: Path | str) -> None:
    """Raises a ValueError for the first field of a configuration that says what no model here can do.

    Args:
        expected: Field and the one value that is supported; a missing field counts as that value.
    """
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: `{name}` must be {value!r}, got {shown(config[name])}.")


def stock_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the fields that would have transformers look for code: kernels for attention, classes of its own."""
    return {
        name: stock_settings(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _UNHEEDED
    }


def stock_config(kind: Any, settings: Mapping[str, Any], file: Path) -> Any:
    """A configuration of transformers' from a config.json that `stock_settings` went over.

    Raises:
        ValueError: If the class refuses it, naming the file.
    """
    inner = settings.get(kind.base_config_key) if settings.get("model_type") != kind.model_type else None
    with one_sentence(f"{file} makes no {kind.__name__}"):
        return kind.from_dict(dict(inner if isinstance(inner, dict) else settings))


def check_fields(kind: type, settings: Mapping[str, Any], file: Path | str) -> None:
    """Refuses fields of a configuration whose type is not that of the class's argument.

    Raises:
        ValueError: For the first such field.
    """
    for name, hint in typing.get_type_hints(kind.__init__).items():  # type: ignore[misc]
        if name in settings and not _fits(settings[name], hint):
            shown_hint = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{file}: `{name}` must be of the type {shown_hint}, got {shown(settings[name])}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if origin in (tuple, list, collections.abc.Sequence) or hint in (tuple, list):
        return isinstance(value, (list, tuple)) and all(_fits(one, arguments[0]) for one in value if arguments)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    return True
