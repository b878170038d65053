"""Models in public checkpoints: checked key by key, then loaded or written one tensor at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from ..files import save_json
from .errors import first_few, one_sentence, short_path, writing_natively
from .weights import Checkpoint

SHARD_SIZE = 5 * 10**9
"""Bytes of a weight file, at most; larger models are split."""
_LARGEST_BUFFER = 10**8


def _unchanged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def renamed(key: str, key_mapping: Mapping[str, str]) -> str:
    """A key after all replacements of a key mapping, in their order, as in transformers' `key_mapping`."""
    for pattern, replacement in key_mapping.items():
        key = re.sub(pattern, replacement, key)
    return key


@dataclass
class ModelSource:
    """A model in a public checkpoint, and how its tensors become those of the model.

    Attributes:
        checkpoint: The weight files.
        build: Makes the model; it is only called where its weights take no memory.
        probe: Runs the model on a fixed input, with the same output before and after a conversion.
        key_mapping: Regular expressions for parts of keys, and what replaces them in the model's names.
        unused_keys: Regular expression for the start of keys that the model may have no tensor for, such as another head's.
        convert_tensor: From a tensor's name in the model and its stored value, its value in the model.
    """

    checkpoint: Checkpoint
    build: Callable[[], Any]
    probe: Callable[[Any], torch.Tensor]
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    unused_keys: str = "(?!)"
    convert_tensor: Callable[[str, torch.Tensor], torch.Tensor] = _unchanged

    @functools.cached_property
    def skeleton(self) -> Any:
        """The model on the device "meta": shapes and names without memory for weights.

        Raises:
            ValueError: If the configuration makes no model, or one of far more tensors than the checkpoint has.
        """
        return build_skeleton(self.build, self.checkpoint)

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """For each tensor of the model that is in the checkpoint, its name and the key that it comes from.

        Raises:
            ValueError: For a key that the model does not have, one that is missing, or one of another shape or dtype.
        """
        expected = self.skeleton.state_dict()
        model_name = type(self.skeleton).__name__
        found: dict[str, str] = {}
        unexpected: list[str] = []
        for key in self.checkpoint.shapes:
            name = renamed(key, self.key_mapping)
            if name not in expected:
                if not re.match(self.unused_keys, name):
                    unexpected.append(key)
            elif found.setdefault(name, key) != key:
                file = short_path(self.checkpoint.file_of(key))
                raise ValueError(f"{file}: {found[name]} and {key} are the same tensor of a {model_name}.")
        if unexpected:
            file = short_path(self.checkpoint.file_of(unexpected[0]))
            raise ValueError(f"{file} has {len(unexpected)} keys that a {model_name} does not have: {first_few(unexpected)}.")
        check_tensors(self.skeleton, self.checkpoint, found, self.convert_tensor)
        return found

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every tensor of the model that is in the checkpoint, file by file.

        Args:
            dtype: Of floating-point tensors, except those that the model keeps in float32; by default the stored one, or if the
                checkpoint has several, that of the most elements.
        """
        order = {file: number for number, file in enumerate(self.checkpoint.files)}
        for name, key in sorted(self.keys.items(), key=lambda item: order[self.checkpoint.file_of(item[1])]):
            yield name, self._converted(name, self.checkpoint.tensor(key), dtype)

    def _converted(self, name: str, stored: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        tensor = self.convert_tensor(name, stored)
        if not tensor.is_floating_point():
            return tensor
        float32 = set(getattr(self.skeleton, "_keep_in_fp32_modules", None) or ())
        return tensor.to(torch.float32 if float32 & set(name.split(".")) else self.checkpoint.computing_dtype(dtype))

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
        # Of tied names, which are one tensor, the first in the checkpoint is written.
        repeated = {name for names in tied_names(model) for name in [name for name in self.keys if name in names][1:]}
        keys = {name: key for name, key in self.keys.items() if name not in repeated}
        empty = {name: self._converted(name, self.checkpoint.empty(key), dtype) for name, key in keys.items()}
        shards = split_state_dict_into_shards_factory(
            empty,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=shard_size,
        )
        for file_name, names in shards.filename_to_tensors.items():
            file = folder / file_name
            tensors = {name: self._converted(name, self.checkpoint.tensor(keys[name]), dtype).contiguous() for name in names}
            with writing_natively(file):
                save_file(tensors, file, metadata={"format": "pt"})
                # The library makes files that only their owner can read; the folder has the permissions that the umask allows.
                file.chmod(folder.stat().st_mode & 0o666)
            del tensors  # before those of the next shard are read
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            save_json(index, folder / f"{stem}.safetensors.index.json")
        return shards.metadata["total_size"]


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
    convert_tensor: Callable[[str, torch.Tensor], torch.Tensor] = _unchanged,
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
        raise ValueError(f"{checkpoint.described}: {len(missing)} tensors of the {kind} are missing: {first_few(missing)}.")
    for name, expected in model.state_dict().items():
        if name not in found:
            continue
        key = found[name]
        file, dtype = short_path(checkpoint.file_of(key)), checkpoint.dtype_of(key)
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
