"""Public checkpoints, read one tensor at a time: checked key by key, loaded into a model, or written in safetensors."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import read_json, read_tensors, save_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SHARD_SIZE = 5 * 10**9
"""Bytes of a weight file, at most; larger models are split."""

_NAMED = 5


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


def known_fields(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a configuration that are arguments of the class."""
    names = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    return {name: value for name, value in config.items() if name in names}


@dataclass
class _Entry:
    file: Path
    shape: tuple[int, ...]


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
                shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            else:
                handle = self._handle(file)
                shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
            self._entries |= {key: _Entry(file, shape) for key, shape in shapes.items()}

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            try:
                self._open = file, safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a safetensors file, or is damaged: {error}.") from None
        return self._open[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key."""
        return {key: entry.shape for key, entry in self._entries.items()}

    def file_of(self, key: str) -> Path:
        """The file that holds a key."""
        return self._entries[key].file

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


def find_weights(folder: Path, names: Sequence[str], wrapper: Sequence[str] = ()) -> Checkpoint:
    """The weights in a folder: the first of `names` that is there, whole or as an index of shards.

    Args:
        names: File names, the preferred one first, such as ("model.safetensors", "pytorch_model.bin").
        wrapper: As in `Checkpoint`.

    Raises:
        ValueError: If there is none, or a shard that the index names is missing.
    """
    for name in names:
        if (folder / name).is_file():
            return Checkpoint([folder / name], wrapper)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
            if missing or not shards:
                raise ValueError(f"{index} names files that are missing: {', '.join(missing) or 'none are named'}.")
            return Checkpoint([folder / shard for shard in shards], wrapper)
    raise ValueError(f"{folder} has no weights: none of {', '.join(names)} (or their .index.json) is there.")


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
        """The model without memory for its weights."""
        with torch.device("meta"):
            return self.build()

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """Every tensor of the model, by name, and the key of the checkpoint that it comes from.

        Raises:
            ValueError: For a key that the model does not have, one that is missing, or one of another shape.
        """
        model, tied = self.skeleton, tied_names(self.skeleton)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        kind, shapes = type(model).__name__, self.checkpoint.shapes
        found: dict[str, str] = {}
        for key in shapes:
            name = self.convert_key(key)
            if name is not None and found.setdefault(name, key) != key:
                raise ValueError(f"{self.checkpoint.file_of(key).name}: {found[name]} and {key} are the same tensor of a {kind}.")
        extra = [key for name, key in found.items() if name not in expected]
        if extra:
            file = self.checkpoint.file_of(extra[0]).name
            raise ValueError(f"{file} has {len(extra)} keys that a {kind} does not have: {_some(extra)}.")
        missing = [name for name in expected if name not in found and name not in tied]
        if missing:
            files = ", ".join(sorted({file.name for file in self.checkpoint.files}))
            raise ValueError(f"{files}: {len(missing)} tensors of the {kind} are missing: {_some(missing)}.")
        for name, key in found.items():
            shape = tuple(self.convert_tensor(name, torch.empty(shapes[key], device="meta")).shape)
            if shape != expected[name]:
                file = self.checkpoint.file_of(key).name
                raise ValueError(f"{file}: {key} must have the shape {expected[name]} for this {kind}, got {shape}.")
        return found

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every tensor of the model, file by file.

        Args:
            dtype: For floating-point tensors, except those that the model keeps in float32; by default as stored.
        """
        float32 = getattr(self.skeleton, "_keep_in_fp32_modules", None) or ()
        order = {file: place for place, file in enumerate(self.checkpoint.files)}
        for name, key in sorted(self.keys.items(), key=lambda item: order[self.checkpoint.file_of(item[1])]):
            tensor = self.convert_tensor(name, self.checkpoint.tensor(key))
            cast = dtype is not None and tensor.is_floating_point() and not set(float32) & set(name.split("."))
            yield name, tensor.to(dtype) if cast else tensor

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The model with its weights, in evaluation mode; its memory and one tensor more are all that is needed."""
        # Unlike `skeleton`, with the values of buffers that are no part of a checkpoint; ties are lost on the way.
        with init_empty_weights(include_buffers=False):
            model = self.build()
        for name, tensor in self.tensors(dtype):
            model.load_state_dict({name: tensor}, strict=False, assign=True)
        for name, first in tied_names(self.skeleton).items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(first))
        return model.eval().requires_grad_(False)

    def write(self, folder: Path, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> int:
        """Writes the model as `save_pretrained` does, one shard in memory at a time; returns the bytes written.

        Args:
            folder: Exists and is empty.
        """
        model, tied = self.skeleton, tied_names(self.skeleton)
        if hasattr(model, "save_config"):
            model.save_config(folder)
            stem = "diffusion_pytorch_model"
        else:
            model.config.architectures = [type(model).__name__]
            model.config.dtype = dtype or next(iter(self.tensors()))[1].dtype
            model.config.save_pretrained(folder)
            stem = "model"
        shards: list[list[str]] = []
        pending: dict[str, torch.Tensor] = {}
        pending_bytes = total = 0

        def flush() -> None:
            if pending:
                save_file(pending, folder / f"{stem}-{len(shards) + 1:05d}.safetensors", metadata={"format": "pt"})
                shards.append(list(pending))
                pending.clear()

        for name, tensor in self.tensors(dtype):
            if name in tied:
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


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Parameters that are another one under a second name, and that other one's name."""
    first: dict[int, str] = {}
    every = [(name, first.setdefault(id(value), name)) for name, value in model.named_parameters(remove_duplicate=False)]
    return {name: owner for name, owner in every if owner != name}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def require_fields(config: Mapping[str, Any], expected: Mapping[str, Any], file: Path | str) -> None:
    """Raises a ValueError for the first field of a configuration that says what no model here can do.

    Args:
        expected: Field and the one value that is supported; a missing field counts as that value.
    """
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: `{name}` must be {value!r}, got {config[name]!r}.")
