"""Models in published checkpoints: checked key by key, then loaded or written one tensor at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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
    """A model in a published checkpoint, and how the stored tensors become those of the model.

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
    takes_options: ClassVar[bool] = False
    """Whether `load` takes the arguments of the model's `from_pretrained`."""

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

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Reads the value of one tensor of the model, by its name there; `dtype` as in `tensors`."""
        return self._converted(name, self.checkpoint.tensor(self.keys[name]), dtype)

    def _converted(self, name: str, stored: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        tensor = self.convert_tensor(name, stored)
        if not tensor.is_floating_point():
            return tensor
        kept = [*(getattr(self.skeleton, "_keep_in_fp32_modules", None) or ())]
        kept += getattr(self.skeleton, "_keep_in_fp32_modules_strict", None) or ()
        in_float32 = any(f".{part}." in f".{name}." for part in kept)
        return tensor.to(torch.float32 if in_float32 else self.checkpoint.computing_dtype(dtype))

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """The bytes of the model in a dtype, by default the stored one."""
        return self.checkpoint.computing_dtype(dtype).itemsize * sum(value.numel() for value in self.skeleton.parameters())

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The model with its weights, in evaluation mode; takes the memory of the model and one more tensor."""
        _ = self.keys  # checks them before anything is read
        # Unlike `skeleton`, this has the values of buffers that are not in the checkpoint. Ties of parameters are restored below.
        with init_empty_weights(include_buffers=False):
            model = self.build()
        for name, tensor in self.tensors(dtype):
            model.load_state_dict({name: tensor}, strict=False, assign=True)
        self.tie(model)
        return model.eval().requires_grad_(False)

    def tie(self, model: Any) -> None:
        """Makes one parameter of those that are tied.

        Raises:
            ValueError: If the checkpoint has different values for them.
        """
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

    def write(self, folder: Path, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> int:
        """Writes the model as `save_pretrained` does, with one shard in memory at a time.

        Args:
            folder: An empty folder.
            dtype: As in `tensors`.
            shard_size: Largest size of a file, in bytes, unless a single tensor is larger.

        Returns:
            The bytes of all weights.

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
        repeated: set[str] = set()
        for names in tied_names(model):  # of these, which are one tensor, the first in the checkpoint is written
            repeated.update([name for name in self.keys if name in names][1:])
        keys = {name: key for name, key in self.keys.items() if name not in repeated}
        empty = {name: self._converted(name, self.checkpoint.empty(key), dtype) for name, key in keys.items()}
        shards = split_state_dict_into_shards_factory(
            empty,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=shard_size,
        )
        for file_name, file_tensors in shards.filename_to_tensors.items():
            file = folder / file_name
            tensors = {
                name: self._converted(name, self.checkpoint.tensor(keys[name]), dtype).contiguous() for name in file_tensors
            }
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
    """Groups of names that stand for one parameter: tied when the model is built, or tied by its class after loading."""
    named = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, set[str]] = {}
    for name, value in named.items():
        groups.setdefault(id(value), set()).add(name)
    # transformers ties parameters when it loads weights; on the device "meta" they are still separate.
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in named and source in named and groups[id(named[target])] is not groups[id(named[source])]:
            group = groups[id(named[target])] | groups[id(named[source])]
            for name in group:
                groups[id(named[name])] = group
    unique = {id(group): group for group in groups.values() if len(group) > 1}
    return list(unique.values())


def computed_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that the model computes when it is built, such as positions and frequencies.

    Batch norms' running statistics come from training and are not included.
    """
    measured = tuple(name for name, module in model.named_modules() if isinstance(module, _NormBase))
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in buffers if name.rpartition(".")[0] not in measured}


def missing_tensors(model: torch.nn.Module, found: Container[str]) -> list[str]:
    """Names of the tensors that a model needs and a checkpoint with the names `found` lacks.

    One of several tied names is enough. Computed buffers are not needed, nor tensors that the class declares optional.
    """
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    groups = {name: names for names in tied_names(model) for name in names}
    present = {name for names in groups.values() if any(name in found for name in names) for name in names}
    computed = computed_buffers(model)
    missing = []
    for name in model.state_dict():
        if name in found or name in present or name in computed or any(pattern.search(name) for pattern in optional):
            continue
        present |= groups.get(name, set())  # tied names are reported once
        missing.append(name)
    return missing


def check_tensors(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    found: Mapping[str, str],
    convert_tensor: Callable[[str, torch.Tensor], torch.Tensor] = _unchanged,
) -> None:
    """Checks that a checkpoint has every tensor that a model needs.

    Args:
        model: The model on the device "meta".
        checkpoint: The checkpoint.
        found: The key in the checkpoint of each of the model's tensors, by its name there.
        convert_tensor: As in `ModelSource`.

    Raises:
        ValueError: For a tensor that is missing, has the wrong shape, or is not floating-point where the model's is.
    """
    model_name = type(model).__name__
    missing = missing_tensors(model, found)
    if missing:
        raise ValueError(f"{checkpoint.described}: {len(missing)} tensors of the {model_name} are missing: {first_few(missing)}.")
    for name, expected in model.state_dict().items():
        if name not in found:
            continue
        key = found[name]
        file = short_path(checkpoint.file_of(key))
        dtype = checkpoint.dtype_of(key)
        with one_sentence(f"{file}: {key} does not fit this {model_name}"):
            shape = tuple(convert_tensor(name, checkpoint.empty(key).float()).shape)
        if shape != tuple(expected.shape):
            raise ValueError(f"{file}: {key} must have the shape {tuple(expected.shape)} for this {model_name}, got {shape}.")
        if expected.is_floating_point() and not dtype.is_floating_point:
            raise ValueError(f"{file}: {key} must hold floating-point numbers for this {model_name}, got {dtype}.")
    for name, buffer in computed_buffers(model).items():
        if name not in found and buffer.numel() > _LARGEST_BUFFER:
            where = checkpoint.files[0].parent / "config.json"
            raise ValueError(
                f"{where}: the {model_name}'s {name} would have the shape {tuple(buffer.shape)}, which is too large."
            )


class _TensorLimit(TorchFunctionMode):
    """Stops the construction of a model that creates far more tensors than its checkpoint holds."""

    def __init__(self, limit: int, message: str):
        super().__init__()
        self.remaining = limit
        self.message = message

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts a call of a torch function."""
        self.remaining -= 1
        if self.remaining < 0:
            raise ValueError(self.message)
        return func(*args, **(kwargs or {}))


def build_skeleton(build: Callable[[], Any], checkpoint: Checkpoint) -> Any:
    """A model on the device "meta", built only if a checkpoint can fill it.

    Raises:
        ValueError: If the configuration makes no model, or one of far more tensors than the checkpoint has.
    """
    config = checkpoint.files[0].parent / "config.json"
    count = len(checkpoint.shapes)
    where = config if config.exists() else checkpoint.files[0]
    message = f"{where} describes a model of far more tensors than the {count} of {checkpoint.described}."
    # Building a model takes a handful of calls for each of its tensors.
    with one_sentence(f"{where} makes no model"), torch.device("meta"), _TensorLimit(10_000 + 100 * count, message):
        return build()
