"""Pipelines from repositories: recognised, and loaded from their publisher's format or from diffusers' own."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from ..checks import check_type, shown
from ..components import check_component_types, keep_scale_factor
from ..model_cards import SharedPipeline
from .errors import one_sentence
from .placement import Placement, load_source
from .repository import EMBEDDED_MODELS, MODEL_INDEX, HubArguments, Repository
from .saved import component_types, index_classes, placed, reference
from .source import ModelSource
from .weights import parse_dtype

Dtypes = torch.dtype | dict[str, torch.dtype | None] | None

SAVED_ARGUMENTS = (
    "cache_dir",
    "disable_mmap",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "offload_state_dict",
    "proxies",
    "revision",
    "token",
    "use_safetensors",
    "variant",
)
"""What `DiffusionPipeline.from_pretrained` takes for folders in diffusers' format, besides `dtype` and components."""


@dataclass
class PublishedPipeline:
    """A checkpoint that was opened, but whose weights were not read yet.

    Attributes:
        pipeline: The class that runs it.
        models: By component, the models that its weights belong to.
        components: The constructor's other arguments: tokenizer, scheduler, settings.
    """

    pipeline: type[DiffusionPipeline]
    models: dict[str, ModelSource]
    components: dict[str, Any]

    def check(self) -> None:
        """Checks the names and shapes of all tensors of all models, before any of them is read.

        Raises:
            ValueError: For the first that is missing, unexpected or misshapen.
        """
        for source in self.models.values():
            _ = source.keys

    def load(self, dtype: Dtypes = None, placement: Placement | None = None) -> Any:
        """The pipeline with its weights; `dtype` None keeps them as they are stored.

        Raises:
            ValueError: For a tensor as in `check`, or a placement that the models cannot have.
        """
        self.check()
        placement = placement or Placement()
        classes = {name: type(source.skeleton) for name, source in self.models.items()}
        placement.check(self.pipeline, classes)
        sizes = {name: source.num_bytes(_dtype_of(dtype, name)) for name, source in self.models.items()}
        places = placement.places(sizes)
        options = placement.options(self.pipeline, classes, places, lambda name: _dtype_of(dtype, name))
        models = {name: load_source(source, _dtype_of(dtype, name), options[name]) for name, source in self.models.items()}
        return placement.finish(self.pipeline(**models, **self.components), places)


class CheckedPipeline(SharedPipeline):
    """A pipeline that recognises its repositories and loads them completely, or raises an error that says what is missing.

    A family says how it is published by `is_published` and `open_published`.
    """

    families: ClassVar[tuple[str, ...]]
    """Names of the models that the pipeline runs, for errors."""
    saved_as: ClassVar[tuple[str, ...]] = ()
    """Other classes whose saved folders the pipeline loads."""
    published_in_diffusers_format: ClassVar[bool] = False
    """Whether the family has no format of its own."""
    repository_options: ClassVar[tuple[str, ...]] = ()
    """What `from_pretrained` takes for published repositories, besides `HubArguments`, `dtype` and components."""

    @classmethod
    def recognises(cls, repository: Repository) -> bool:
        """Whether the pipeline is the one for a repository: its models as published, or a folder that it saved."""
        return cls.is_published(repository) or cls.is_saved(repository)

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether a repository has the format in which the family's models are published, if that is not diffusers' own."""
        return False

    @classmethod
    def is_saved(cls, repository: Repository) -> bool:
        """Whether a repository is in diffusers' format and names this pipeline."""
        return repository.class_name in saved_names(cls)

    @classmethod
    def open_published(
        cls, repository: str | os.PathLike[str], *, without: Collection[str] = (), **options: Any
    ) -> PublishedPipeline:
        """Opens a published repository, to be loaded or converted; no code of it runs.

        Args:
            repository: Folder or Hub id.
            without: Models that are not opened, because the caller replaces them or needs none.
            options: `HubArguments`, and `repository_options` of the pipeline.

        Raises:
            ValueError: For a repository of another family, or a family that is published in diffusers' format.
            OSError: If there is no such repository, or it has no model_index.json.
        """
        check_repository_class(cls, Repository(repository, HubArguments(**HubArguments.given(options))))
        raise ValueError(f"{os.fspath(repository)!r} is in diffusers' format: load it with `{cls.__name__}.from_pretrained`.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Loads a published repository, or a folder that `save_pretrained` or `diffusers-infogain convert` wrote.

        Args:
            pretrained_model_name_or_path: Folder, Hub id, or the name of a model that ships with the package ("demo",
                "demo-text").
            kwargs: For a published repository `dtype`, components, and the options of `open_published`. For a saved folder as in
                `DiffusionPipeline.from_pretrained`; weights are read from safetensors only, unless `use_safetensors=False` is
                given. Without a `dtype` weights keep the one in which they are stored. For both, the attributes of `Placement`:
                `quantization_config`, `device_map`, `max_memory`, `offload_folder` and `attn_implementation`.

        Raises:
            ValueError: For a repository of another family, or weights with a missing, unexpected or misshapen tensor.
            TypeError: For an unknown argument.
            OSError: If there is no such repository.
        """
        name = pretrained_model_name_or_path
        folder = EMBEDDED_MODELS.get(os.fspath(name))
        if folder is None:
            return load_saved_or_published(cls, super().from_pretrained, name, kwargs)
        if "torch_dtype" not in kwargs:
            kwargs = {"dtype": torch.float32, **kwargs}  # some are stored in half precision to be small
        pipe = load_saved_or_published(cls, super().from_pretrained, folder, kwargs)
        pipe.register_to_config(_name_or_path=name)  # recorded with the images
        return pipe

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As in diffusers, which loads what is found here: components by their checked classes.

        Raises:
            ValueError: If model_index.json is of another pipeline, or names components that this one does not have.
        """
        check_saved_class(cls, config_dict.get("_class_name"), MODEL_INDEX)
        classes = index_classes(cls, config_dict, MODEL_INDEX)
        found, *rest = super().extract_init_dict(config_dict, **kwargs)
        return {**found, **{name: reference(component) for name, component in classes.items() if name in found}}, *rest


def saved_names(cls: type[CheckedPipeline]) -> set[str]:
    """The class names in model_index.json that a pipeline accepts as its own."""
    bases = {base.__name__ for base in cls.__mro__ if hasattr(base, "families")}
    return bases | set(cls.saved_as)


def check_saved_class(cls: type[CheckedPipeline], name: Any, where: str) -> None:
    """Raises a ValueError if a model_index.json does not name the pipeline."""
    if not isinstance(name, str) or name not in saved_names(cls):
        raise ValueError(
            f"{where} must name the pipeline {cls.__name__}, got {shown(name)}: `diffusers_infogain.load` finds the right one."
        )


def check_repository_class(cls: type[CheckedPipeline], repository: Repository) -> None:
    """Raises an error unless a repository is in diffusers' format and names the pipeline."""
    if repository.class_name is None:
        raise OSError(f"{os.fspath(repository.name)} has no {MODEL_INDEX}.")
    check_saved_class(cls, repository.class_name, str(repository.path / MODEL_INDEX))


def _take_dtype(arguments: dict[str, Any]) -> Dtypes:
    """Removes `dtype`, or `torch_dtype` as it was called, from the arguments: one for all, or by component; None is as stored.

    Raises:
        TypeError: If both are given.
        ValueError: If it is not a dtype.
    """
    if {"dtype", "torch_dtype"} <= arguments.keys():
        raise TypeError("from_pretrained() got both `dtype` and `torch_dtype`, which are one argument by two names")
    given = arguments.pop("dtype", arguments.pop("torch_dtype", None))

    def parsed(value: Any) -> torch.dtype | None:
        dtype = parse_dtype(value)
        return dtype if isinstance(dtype, torch.dtype) else None

    return {str(name): parsed(value) for name, value in given.items()} if isinstance(given, dict) else parsed(given)


def _dtype_of(dtypes: Dtypes, name: str) -> torch.dtype | None:
    return dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes


def _refuse_code(arguments: dict[str, Any]) -> None:
    if arguments.pop("trust_remote_code", False):
        raise ValueError("`trust_remote_code` must be False: no code of a repository is run here, and none is needed.")


def load_saved_or_published(
    cls: type[CheckedPipeline], load_saved: Callable[..., Any], name: str | os.PathLike[str], arguments: Mapping[str, Any]
) -> Any:
    """Loads a folder that the pipeline saved, or any other repository in its publisher's format.

    Args:
        cls: The pipeline.
        load_saved: `DiffusionPipeline.from_pretrained` of the class.
        name: Folder, file or Hub id.
        arguments: Those of `from_pretrained`.

    Raises:
        ValueError: If the repository is of another pipeline.
        TypeError: For an argument that does not apply to such a repository.
    """
    # Published repositories take folders and Hub ids in place of some components too.
    check_component_types({key: value for key, value in arguments.items() if not isinstance(value, (str, os.PathLike))})
    for argument in ("variant", "revision"):
        check_type(argument, arguments.get(argument), (str, type(None)), "a string or None")
    repository = Repository(name, HubArguments(**HubArguments.given(arguments)))
    arguments = dict(arguments)
    dtype, placement = _take_dtype(arguments), Placement.take(arguments)
    _refuse_code(arguments)
    if not cls.is_published(repository):
        if cls.is_saved(repository):
            return _load_saved(cls, load_saved, repository, arguments, dtype, placement)
        if cls.published_in_diffusers_format or (repository.class_name or "").startswith(("InfoGain", "Amused")):
            check_repository_class(cls, repository)
    return _load_published(cls, repository, arguments, dtype, placement)


def _load_saved(
    cls: type[CheckedPipeline],
    load_saved: Callable[..., Any],
    repository: Repository,
    arguments: Mapping[str, Any],
    dtype: Dtypes,
    placement: Placement,
) -> Any:
    check_component_types(arguments)
    index = {**(repository.index or {}), **{name: [None, None] for name in arguments}}
    classes = index_classes(cls, index, str(repository.path / MODEL_INDEX), complete=repository.path.is_dir())
    models = {name: found for name, found in classes.items() if issubclass(found, torch.nn.Module)}
    placement.check(cls, models)
    for argument in arguments:
        if argument not in (*SAVED_ARGUMENTS, *component_types(cls)):
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {argument!r}")
    by_diffusers = {}
    if placement.device_map == "balanced" and len(models) > 1:  # for which diffusers finds out the sizes of the models
        by_diffusers = {"device_map": "balanced", "max_memory": placement.max_memory}
        placement = replace(placement, device_map=None, max_memory=None)
    places = placement.places(dict.fromkeys(models, 0))
    options = placement.options(cls, models, places, lambda name: _dtype_of(dtype, name))
    with one_sentence(os.fspath(repository.name)), placed(options):
        pipe = load_saved(repository.name, **{"use_safetensors": True, **arguments, **by_diffusers, "dtype": dtype})
    placement.finish(pipe, places)
    keep_scale_factor(pipe, repository.name, arguments, asdict(repository.hub))
    return pipe


def _load_published(
    cls: type[CheckedPipeline], repository: Repository, arguments: dict[str, Any], dtype: Dtypes, placement: Placement
) -> Any:
    components = component_types(cls)
    given = {name: arguments.pop(name) for name in components if not isinstance(arguments.get(name, ""), (str, os.PathLike))}
    for argument in arguments:
        if argument not in (*cls.repository_options, *HubArguments.names()):
            also = argument in SAVED_ARGUMENTS
            why = f": {str(repository.name)!r} is not in diffusers' format; `diffusers-infogain convert` writes it in that" * also
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {argument!r}{why}")
    published = cls.open_published(repository.name, without=tuple(given), **arguments)
    for component, value in given.items():
        published.models.pop(component, None)
        published.components[component] = value
    pipe = published.load(dtype, placement)
    pipe.register_to_config(_name_or_path=os.fspath(repository.name))  # recorded with the images
    return pipe
