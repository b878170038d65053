"""Components of diffusers folders, loaded by their libraries and checked.

diffusers and transformers fill a tensor that a file lacks with random numbers and only warn. They load a component of a pipeline
with its class's `from_pretrained`, so that is where the check stands: the pipelines of this package have their components loaded
by subclasses from here, which give back an object of the class itself. This holds for `DiffusionPipeline.from_pretrained` with a
`custom_pipeline` too.
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
from pathlib import Path
from types import UnionType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin

# diffusers looks for these names in this module to find out how to load a component.
from transformers import PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: F401

from ..checks import shown
from ..files import read_json, regular_file
from ..scheduling_infogain import InfoGainScheduler
from .configs import check_fields, check_sizes, stock_config, stock_settings
from .errors import first_few, one_sentence
from .source import build_skeleton, check_tensors, computed_buffers
from .weights import Checkpoint, find_weights, has_weights, parse_dtype, weight_names

BASES = (ModelMixin, PreTrainedModel, SchedulerMixin, PreTrainedTokenizerBase)
"""What a component can be."""

_OWN_MODULE = re.compile(r"diffusers_infogain\.(models\.[a-z0-9_]+|scheduling_infogain)")


def component_class(library: Any, name: Any, where: str) -> type:
    """The class that a model_index.json names, if it is a component of diffusers, transformers or this package.

    Raises:
        ValueError: For anything else, naming `where` it stands.
    """
    kind: Any = None
    if [library, name] == ["diffusers", "AmusedScheduler"]:
        return InfoGainScheduler  # which reads its configuration
    if not (isinstance(library, str) and isinstance(name, str)):
        pass
    elif library in ("diffusers", "transformers") and name.isidentifier():
        with one_sentence(where):
            kind = getattr(diffusers if library == "diffusers" else transformers, name, None)
    elif _OWN_MODULE.fullmatch(library) and importlib.util.find_spec(library) is not None:
        kind = vars(importlib.import_module(library)).get(name)
        kind = kind if getattr(kind, "__module__", None) == library else None
    if not (isinstance(kind, type) and issubclass(kind, BASES)):
        raise ValueError(
            f"{where} must be a model, tokenizer or scheduler of diffusers, transformers or diffusers_infogain, got "
            f"{shown([library, name])}."
        )
    return kind


def _types(hint: Any) -> list[Any]:
    """What an annotation allows, of a union one by one."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) else [hint]


def component_types(pipeline: type) -> dict[str, list[Any]]:
    """What the constructor of a pipeline takes, and of which types."""
    hints = typing.get_type_hints(pipeline.__init__)  # type: ignore[misc]
    parameters = list(inspect.signature(pipeline.__init__).parameters)[1:]  # type: ignore[misc]
    return {name: _types(hints.get(name, Any)) for name in parameters}


def index_classes(pipeline: type, index: Mapping[str, Any], where: str, complete: bool = False) -> dict[str, type]:
    """The classes of the components that a model_index.json names.

    Args:
        pipeline: The pipeline's class.
        index: The content of the file.
        where: Its name, for errors.
        complete: Whether there must be an entry for every component; one for none is [null, null].

    Raises:
        ValueError: If an entry is no pair of library and class, or another kind of component than the pipeline's.
    """
    check_fields(pipeline, {name: value for name, value in index.items() if not isinstance(value, list)}, where)
    found: dict[str, type] = {}
    for name, allowed in component_types(pipeline).items():
        bases = tuple(kind for kind in allowed if isinstance(kind, type) and issubclass(kind, BASES))
        if not bases or name not in index:
            if bases and complete:
                raise ValueError(f"{where} has no `{name}`.")
            continue
        entry = index[name]
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2):
            raise ValueError(f"{where}: `{name}` must be a list of a library and a class, got {shown(entry)}.")
        if entry[0] is None:
            continue
        kind = component_class(entry[0], entry[1], f"{where}: `{name}`")
        # Which scheduler it is, the pipeline checks, and tokenizers have several classes for one format.
        wanted = next((base for base in (SchedulerMixin, PreTrainedTokenizerBase) if issubclass(bases[0], base)), bases)
        if not issubclass(kind, wanted):
            raise ValueError(f"{where}: `{name}` must be a {bases[0].__name__}, got {kind.__name__}.")
        found[name] = kind
    return found


@functools.cache
def checked(kind: type) -> type:
    """A subclass whose `from_pretrained` is `load_component` of the class itself."""

    def from_pretrained(cls: type, pretrained_model_name_or_path: str, **options: Any) -> Any:
        return load_component(kind, Path(pretrained_model_name_or_path), **options)

    return type(kind.__name__, (kind,), {"from_pretrained": classmethod(from_pretrained), "__module__": __name__})


_CHECKED: dict[str, type] = {}


def reference(kind: type) -> tuple[str, str]:
    """The library and name under which diffusers finds the checked subclass."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    _CHECKED[name] = checked(kind)
    return __name__, name


def __getattr__(name: str) -> Any:
    if name in _CHECKED:
        return _CHECKED[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_component(kind: Any, folder: Path, **options: Any) -> Any:
    """A component of a diffusers folder.

    Args:
        kind: Its class.
        folder: Its folder.
        options: As in the class's `from_pretrained`; `dtype` None and "auto" mean as stored.

    Raises:
        ValueError: If its files are not those of such a component, naming the first, and for weights the tensor.
        OSError: If a file is missing.
    """
    check_regular_files(folder)
    if issubclass(kind, PreTrainedTokenizerBase):
        return load_tokenizer(kind, folder, **options)
    if issubclass(kind, SchedulerMixin):
        file = folder / "scheduler_config.json"
        if file.exists():
            read_json(file)
        with one_sentence(str(file)):
            return kind.from_pretrained(folder, **options)
    return _load_model(kind, folder, options)


def check_regular_files(folder: Path) -> None:
    """Raises a ValueError if anything in a folder is neither a file nor a folder: libraries would wait for it for ever."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if not path.is_dir():
                regular_file(path)


def load_tokenizer(kind: Any, folder: Path, **options: Any) -> Any:
    """A tokenizer of transformers; no code of the folder runs.

    Args:
        kind: The class, `AutoTokenizer` included.
        options: As in its `from_pretrained`.

    Raises:
        ValueError: If a file is no tokenizer's, naming it.
    """
    check_regular_files(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        if (folder / name).exists():
            read_json(folder / name)
    with one_sentence(f"The tokenizer in {folder} cannot be read"):
        return kind.from_pretrained(folder, **{**options, "trust_remote_code": False})


def _load_model(kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    stock = issubclass(kind, PreTrainedModel)
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
    settings, checkpoint = stock_settings(read_json(file)), find_weights(folder, names)
    options = {**options, **_dtype(checkpoint, options)}
    load = _load_stock if stock else _load_own
    with one_sentence(f"{folder} cannot be loaded as {kind.__name__}"):
        return load(kind, folder, settings, checkpoint, options)


def _dtype(checkpoint: Checkpoint, options: Mapping[str, Any]) -> dict[str, Any]:
    """The dtype to load in, under the name that the library uses."""
    name = "torch_dtype" if "torch_dtype" in options else "dtype"
    dtype = parse_dtype(options.get(name))
    return {name: checkpoint.computing_dtype(dtype if isinstance(dtype, torch.dtype) else None)}


def _load_own(kind: Any, folder: Path, settings: dict[str, Any], checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """A model of diffusers' kind: its tensors have the names of its parameters."""
    check_fields(kind, settings, folder / "config.json")
    check_sizes(settings, checkpoint, folder / "config.json")
    if "quantization_config" not in settings:  # else the tensors are those of the quantiser
        model = build_skeleton(lambda: kind.from_config(settings), checkpoint)
        found = model._fix_state_dict_keys_on_load({key: key for key in checkpoint.shapes})
        check_tensors(model, checkpoint, found)
    return kind.from_pretrained(folder, **options)


def _load_stock(kind: Any, folder: Path, settings: dict[str, Any], checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    """A model of transformers', which says itself what it misses: it knows its tensors by older names too."""
    file = folder / "config.json"
    check_sizes(settings, checkpoint, file)
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    config = stock_config(kind.config_class, settings, file)
    build_skeleton(lambda: kind(copy.deepcopy(config)), checkpoint)
    for key in checkpoint.shapes:
        dtype = checkpoint.dtype_of(key)
        if "quantization_config" not in settings and not dtype.is_floating_point and key.endswith(("weight", "bias")):
            raise ValueError(f"{checkpoint.file_of(key)}: {key} must hold floating-point numbers, got {dtype}.")
    config.name_or_path = str(folder)
    with _without_report():
        model, info = kind.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    check_report(model, checkpoint, info)
    return model


def check_report(model: PreTrainedModel, checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Raises a ValueError for what transformers reports after loading (`output_loading_info`) as missing or of another shape."""
    kind, computed = type(model).__name__, computed_buffers(model)
    missing = sorted(name for name in info["missing_keys"] if name not in computed)
    if missing:
        raise ValueError(f"{checkpoint.described}: {len(missing)} tensors of the {kind} are missing: {first_few(missing)}.")
    for name, stored, expected in sorted(info["mismatched_keys"]):
        shapes = f"must have the shape {tuple(expected)} for this {kind}, got {tuple(stored)}"
        raise ValueError(f"{checkpoint.described}: {name} {shapes}.")
    if info["error_msgs"]:
        raise ValueError(f"{checkpoint.described}: {' '.join(str(info['error_msgs'][0]).split())}")


class _OtherThreads(logging.Filter):
    """Drops what this thread has to say."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record comes from another thread."""
        return record.thread != self.thread


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps back transformers' table of missing tensors: the error says it."""
    logger, silence = logging.getLogger("transformers.modeling_utils"), _OtherThreads()
    loggers = [logger, logging.getLogger("transformers.utils.loading_report")]
    for one in loggers:
        one.addFilter(silence)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(silence)
