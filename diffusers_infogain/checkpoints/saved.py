"""Components of saved pipelines, loaded by diffusers and transformers and checked for missing tensors.

For a tensor that is missing in a file, both libraries use random numbers and only warn. They load each component of a pipeline
with its class's `from_pretrained`, so the pipelines of this package name subclasses from this module instead, whose
`from_pretrained` checks the files and then returns an object of the original class. This also covers
`DiffusionPipeline.from_pretrained` with a `custom_pipeline`.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import logging
import re
import threading
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin

# diffusers looks for these names in a component's module to find out how to load it.
from transformers import PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: F401

from ..checks import shown
from ..files import read_json, regular_file
from ..scheduling_infogain import InfoGainScheduler
from .configs import check_fields, check_sizes, stock_config, stock_settings
from .errors import first_few, one_sentence
from .source import build_skeleton, check_tensors, computed_buffers
from .weights import Checkpoint, find_weights, has_weights, parse_dtype, weight_names

BASES = (ModelMixin, PreTrainedModel, SchedulerMixin, PreTrainedTokenizerBase)
"""The base classes of components."""

_LARGEST_MODEL = 2**24
OWN_CLASSES = {
    "BidirectionalLlama": "models.llada",
    "InfoGainScheduler": "scheduling_infogain",
    "MagvitV2Model": "models.magvit_v2",
    "MaskGenTransformer": "models.maskgen_transformer",
    "MaskGITTransformer2DModel": "models.maskgit_transformer",
    "MeissonicTransformer2DModel": "models.meissonic_transformer",
    "OmniPhi": "models.omni_phi",
    "TiTokBertTransformer": "models.titok_transformer",
    "TiTokTokenizer": "models.titok_tokenizer",
    "TiTokUViTTransformer": "models.titok_transformer",
}
"""The package's own components, and their modules. Saved pipelines name them as diffusers' (see `SharedPipeline`)."""
# Earlier ones name their modules.
_OWN_MODULE = re.compile(r"diffusers_infogain\.(models\.[a-z0-9_]+|scheduling_infogain)")


def component_class(library: Any, name: Any, where: str) -> type:
    """The class of a component in model_index.json, if it belongs to diffusers, transformers or this package.

    Args:
        library, name: The two strings of the entry.
        where: File and field, for errors.

    Raises:
        ValueError: For any other class.
    """
    found: Any = None
    if [library, name] == ["diffusers", "AmusedScheduler"]:
        return InfoGainScheduler  # reads the other's configuration
    if not (isinstance(library, str) and isinstance(name, str)):
        pass
    elif library == "diffusers" and name in OWN_CLASSES:
        found = getattr(importlib.import_module(f"..{OWN_CLASSES[name]}", __package__), name)
    elif library in ("diffusers", "transformers") and name.isidentifier():
        with one_sentence(where):
            found = getattr(diffusers if library == "diffusers" else transformers, name, None)
    elif _OWN_MODULE.fullmatch(library) and importlib.util.find_spec(library) is not None:
        found = vars(importlib.import_module(library)).get(name)
        found = found if getattr(found, "__module__", None) == library else None
    if not (isinstance(found, type) and issubclass(found, BASES)):
        raise ValueError(
            f"{where} must be a model, tokenizer or scheduler of diffusers, transformers or diffusers_infogain, got "
            f"{shown([library, name])}."
        )
    return found


def _types(hint: Any) -> list[Any]:
    """The types that an annotation allows: the members of a union, or the type itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) else [hint]


def component_types(pipeline: type) -> dict[str, list[Any]]:
    """The arguments of a pipeline's constructor, with the types that each allows."""
    hints = typing.get_type_hints(pipeline.__init__)  # type: ignore[misc]
    parameters = list(inspect.signature(pipeline.__init__).parameters)[1:]  # type: ignore[misc]
    return {name: _types(hints.get(name, Any)) for name in parameters}


def index_classes(pipeline: type, index: Mapping[str, Any], where: str, complete: bool = False) -> dict[str, type]:
    """The class of each component that a model_index.json names.

    Args:
        pipeline: The pipeline's class.
        index: The content of the file.
        where: Its name, for errors.
        complete: Whether every component needs an entry; that of an absent one is [null, null].

    Raises:
        ValueError: If an entry is not a list of library and class, or the class is not one that the pipeline takes.
    """
    check_fields(pipeline, {name: value for name, value in index.items() if not isinstance(value, list)}, where)
    found: dict[str, type] = {}
    for name, allowed in component_types(pipeline).items():
        bases = tuple(base for base in allowed if isinstance(base, type) and issubclass(base, BASES))
        if not bases or name not in index:
            if bases and complete:
                raise ValueError(f"{where} has no `{name}`.")
            continue
        entry = index[name]
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2):
            raise ValueError(f"{where}: `{name}` must be a list of a library and a class, got {shown(entry)}.")
        if entry[0] is None:
            continue
        cls = component_class(entry[0], entry[1], f"{where}: `{name}`")
        # The pipeline itself checks the scheduler, and a tokenizer's format can be read by several classes.
        wanted = next((base for base in (SchedulerMixin, PreTrainedTokenizerBase) if issubclass(bases[0], base)), bases)
        if not issubclass(cls, wanted):
            raise ValueError(f"{where}: `{name}` must be a {bases[0].__name__}, got {cls.__name__}.")
        found[name] = cls
    return found


@functools.cache
def checked(component_class: type) -> type:
    """A subclass whose `from_pretrained` is `load_component`, which returns an object of the class itself."""

    def from_pretrained(cls: type, pretrained_model_name_or_path: str, **options: Any) -> Any:
        return load_component(component_class, Path(pretrained_model_name_or_path), **options)

    return type(
        component_class.__name__, (component_class,), {"from_pretrained": classmethod(from_pretrained), "__module__": __name__}
    )


_CHECKED: dict[str, type] = {}


def reference(component_class: type) -> tuple[str, str]:
    """The library and the name by which diffusers finds the checked subclass: this module has an attribute for it."""
    name = f"{component_class.__module__}.{component_class.__qualname__}"
    _CHECKED[name] = checked(component_class)
    return __name__, name


def __getattr__(name: str) -> Any:
    if name in _CHECKED:
        return _CHECKED[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_PLACED: ContextVar[Mapping[str, Mapping[str, Any]]] = ContextVar("_PLACED", default=MappingProxyType({}))


@contextmanager
def placed(options: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Within the block, the models of saved pipelines get further arguments of their `from_pretrained`, by name.

    Other threads are not concerned. diffusers passes on some arguments only, and the same ones to all models.
    """
    token = _PLACED.set(options)
    try:
        yield
    finally:
        _PLACED.reset(token)


def load_component(cls: Any, folder: Path, **options: Any) -> Any:
    """Loads a component from its folder in a saved pipeline.

    Args:
        cls: Its class.
        folder: Its folder.
        options: As in the class's `from_pretrained`; `dtype` None and "auto" keep the stored one.

    Raises:
        ValueError: If a file is not one of such a component, or a tensor is missing or misshapen, naming it.
        OSError: If a file is missing.
    """
    check_regular_files(folder)
    if issubclass(cls, PreTrainedTokenizerBase):
        return load_tokenizer(cls, folder, **options)
    if issubclass(cls, SchedulerMixin):
        file = folder / "scheduler_config.json"
        if file.exists():
            read_json(file)
        with one_sentence(str(file)):
            return cls.from_pretrained(folder, **options)
    return _load_model(cls, folder, options)


def check_regular_files(folder: Path) -> None:
    """Raises a ValueError if a folder holds anything but files and folders, such as a pipe, on which libraries would block."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if not path.is_dir():
                regular_file(path)


def load_tokenizer(cls: Any, folder: Path, **options: Any) -> Any:
    """Loads a tokenizer of transformers; no code of the folder runs.

    Args:
        cls: Its class, which may be `AutoTokenizer`.
        folder: Its folder.
        options: As in its `from_pretrained`.

    Raises:
        ValueError: If a file is not a tokenizer's, naming it, or none holds the vocabulary, without which transformers makes a
            tokenizer that knows no words.
    """
    check_regular_files(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        if (folder / name).exists():
            read_json(folder / name)
    with one_sentence(f"The tokenizer in {folder} cannot be read"):
        tokenizer = cls.from_pretrained(folder, **{**options, "trust_remote_code": False})
    names = sorted(set(getattr(tokenizer, "vocab_files_names", {}).values()))
    if names and not any((folder / name).exists() for name in names):
        raise ValueError(f"{folder} has no tokenizer: none of {', '.join(names)} is there.")
    return tokenizer


def _load_model(cls: Any, folder: Path, options: dict[str, Any]) -> Any:
    stock = issubclass(cls, PreTrainedModel)
    names = weight_names("model" if stock else "diffusion_pytorch_model", options.get("variant"))
    if options.get("use_safetensors") is not None:
        names = [names[0 if options["use_safetensors"] else 1]]
    file = folder / "config.json"
    if not file.exists():
        raise OSError(f"{folder} has no config.json.")
    if not has_weights(folder, names):
        raise OSError(f"{folder} has no weights: none of {', '.join(names)} (or their .index.json) is there.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json), which no pipeline loads as a component.")
    settings = stock_settings(read_json(file))
    checkpoint = find_weights(folder, names)
    options = {**options, **_dtype(checkpoint, options), **_PLACED.get().get(folder.name, {})}
    load = _load_stock if stock else _load_own
    with one_sentence(f"{folder} cannot be loaded as {cls.__name__}"):
        return load(cls, folder, settings, checkpoint, options)


def _dtype(checkpoint: Checkpoint, options: Mapping[str, Any]) -> dict[str, Any]:
    """The dtype to load in, under the name by which it was given."""
    name = "torch_dtype" if "torch_dtype" in options else "dtype"
    dtype = parse_dtype(options.get(name))
    return {name: checkpoint.computing_dtype(dtype if isinstance(dtype, torch.dtype) else None)}


def _load_own(cls: Any, folder: Path, settings: dict[str, Any], checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """Loads a diffusers model, whose tensors are stored under the names of its parameters."""
    check_fields(cls, settings, folder / "config.json")
    check_sizes(settings, checkpoint, folder / "config.json")
    if "quantization_config" not in settings:  # quantised weights have other names and shapes
        model = build_skeleton(lambda: cls.from_config(settings), checkpoint)
        found = model._fix_state_dict_keys_on_load({key: key for key in checkpoint.shapes})
        check_tensors(model, checkpoint, found)
    return cls.from_pretrained(folder, **options)


def _load_stock(cls: Any, folder: Path, settings: dict[str, Any], checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """Loads a transformers model. transformers itself reports what is missing, because it also accepts older names of tensors."""
    file = folder / "config.json"
    check_sizes(settings, checkpoint, file)
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    config = stock_config(cls.config_class, settings, file)
    skeleton = build_skeleton(lambda: cls(copy.deepcopy(config)), checkpoint)
    # transformers allocates tensors that are missing or misshapen before it reports them.
    size = sum(tensor.numel() for tensor in skeleton.state_dict().values())
    largest = max(_LARGEST_MODEL, 16 * checkpoint.num_elements)  # quantised weights hold up to 16 numbers in one element
    if size > largest:
        raise ValueError(f"{file} describes a model of {size} numbers, far more than {checkpoint.described} can hold.")
    for key in checkpoint.shapes:
        dtype = checkpoint.dtype_of(key)
        if "quantization_config" not in settings and not dtype.is_floating_point and key.endswith(("weight", "bias")):
            raise ValueError(f"{checkpoint.file_of(key)}: {key} must hold floating-point numbers, got {dtype}.")
    config.name_or_path = str(folder)
    with quietly():
        model, info = cls.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_report(model, checkpoint, info)
    return model


def check_report(model: PreTrainedModel, checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Raises a ValueError for tensors that transformers reports as missing or misshapen (`output_loading_info`)."""
    model_name = type(model).__name__
    computed = computed_buffers(model)
    missing = sorted(name for name in info["missing_keys"] if name not in computed)
    if missing:
        raise ValueError(f"{checkpoint.described}: {len(missing)} tensors of the {model_name} are missing: {first_few(missing)}.")
    for name, stored, expected in sorted(info["mismatched_keys"]):
        shapes = f"must have the shape {tuple(expected)} for this {model_name}, got {tuple(stored)}"
        raise ValueError(f"{checkpoint.described}: {name} {shapes}.")
    if info["error_msgs"]:
        raise ValueError(f"{checkpoint.described}: {' '.join(str(info['error_msgs'][0]).split())}")


class _OtherThreads(logging.Filter):
    """Lets only the records of other threads pass."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record comes from another thread."""
        return record.thread != self.thread


@contextmanager
def quietly() -> Iterator[None]:
    """Suppresses transformers' table of missing tensors in this thread; `check_report` raises an error for them."""
    silence = _OtherThreads()
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]
    for logger in loggers:
        logger.addFilter(silence)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(silence)
