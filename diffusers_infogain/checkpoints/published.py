"""Checkpoints in their publishers' formats as pipelines: loaded as they are, or written as a diffusers folder."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout

from ..checks import check_type, shown
from ..components import check_given, keep_scale_factor
from ..files import LOCK, read_json, writing
from ..progress import Progress
from .errors import one_sentence, writing_natively
from .repository import local_folder
from .saved import index_classes, reference
from .source import SHARD_SIZE, ModelSource
from .weights import parse_dtype

MODEL_INDEX = "model_index.json"

Dtypes = torch.dtype | dict[str, torch.dtype | None] | None

SAVED_ARGUMENTS = (
    "cache_dir",
    "device_map",
    "disable_mmap",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "quantization_config",
    "revision",
    "token",
    "use_safetensors",
    "variant",
)
"""What `DiffusionPipeline.from_pretrained` takes for folders in diffusers' format, besides `dtype` and components."""


@dataclass
class PublishedPipeline:
    """A checkpoint that was opened and not yet read.

    Attributes:
        pipeline: The class that runs it.
        models: By component, the models that its weights belong to.
        components: The constructor's other arguments: tokenizer, scheduler, settings.
    """

    pipeline: type[DiffusionPipeline]
    models: dict[str, ModelSource]
    components: dict[str, Any]

    def load(self, dtype: Dtypes = None) -> Any:
        """The pipeline with its weights; `dtype` None keeps them as they are stored."""
        for source in self.models.values():
            _ = source.keys  # all of them are checked before any is read
        models = {name: source.load(_dtype_of(dtype, name)) for name, source in self.models.items()}
        return self.pipeline(**models, **self.components)

    def write(self, target: Path, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> dict[str, int]:
        """Writes a diffusers folder in safetensors and tests it; returns the bytes by model.

        At most one shard is in memory while writing, and one model while testing. `target` appears when everything is done and
        tested; until then a hidden folder beside it grows, which an error or an interruption removes, and else the next run.

        Raises:
            ValueError: If `target` exists or is being written, a tensor is missing, extra or misshapen, or a written model
                computes something else than the original.
            OSError: If something cannot be written, naming it.
        """
        if target.exists() or target.is_symlink():
            raise ValueError(f"The target {str(target)!r} must not exist yet.")
        for source in self.models.values():
            _ = source.keys  # all of them are checked before anything is written
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        sizes = {}
        with _folder_in_place(target) as folder, Progress(total=2 * len(self.models), desc="convert", unit="part") as progress:
            for name, source in self.models.items():
                (folder / name).mkdir()
                progress.set_postfix_str(f"writing {name}")
                sizes[name] = source.write(folder / name, dtype, shard_size)
                progress.update()
            skeletons = {name: source.skeleton for name, source in self.models.items()}
            pipe = self.pipeline(**skeletons, **self.components)
            with writing_natively(folder / MODEL_INDEX):
                pipe.save_config(folder)
            for name, component in self.components.items():
                if hasattr(component, "save_pretrained"):
                    with writing_natively(folder / name):
                        component.save_pretrained(folder / name)
            for name, source in self.models.items():
                progress.set_postfix_str(f"testing {name}")
                _compare(name, source, folder / name, dtype)
                progress.update()
        return sizes


def _compare(name: str, source: ModelSource, folder: Path, dtype: torch.dtype | None) -> None:
    """Raises a ValueError unless the model as written has the published weights, bit for bit, and computes the same."""
    model = source.load(dtype)
    kind, stored, before = type(model), model.dtype, source.probe(model)
    del model
    written = kind.from_pretrained(folder, dtype=stored).eval()
    weights = written.state_dict()
    different = [key for key, value in source.tensors(dtype) if not torch.equal(weights[key], value)]
    if different:
        raise ValueError(f"The written {name} has other weights than the original, such as {different[0]}.")
    after = source.probe(written)
    # Rounding depends on where in memory weights lie.
    tolerance = 64 * torch.finfo(stored).eps * before.abs().max().item()
    difference = (before.float() - after.float()).abs().max().item()
    if not difference <= tolerance:
        raise ValueError(f"The written {name} computes something else than the original: outputs differ by up to {difference:g}.")


@contextmanager
def _folder_in_place(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends without an exception, with the rights that the umask leaves.

    A lock in it tells a run that goes on from one that was killed, whose folder is emptied and taken over.

    Raises:
        ValueError: If another process writes there.
    """
    folder = target.parent / f".{target.name}.part"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"Another command is writing {target}: wait until it has ended, or choose another target.") from None
    try:
        for left in folder.iterdir():
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()
        yield folder
        with writing(target):
            os.replace(folder, target)
        (target / LOCK).unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


class CheckedPipeline(DiffusionPipeline):
    """A pipeline whose saved folders are loaded by `checkpoints.saved`: whole, or with an error that says what is missing."""

    saved_as: ClassVar[tuple[str, ...]] = ()
    """Names of classes of others whose folders these are."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As in diffusers, which loads what is found here: components by their checked classes.

        Raises:
            ValueError: If the model_index.json is of another pipeline, or names something else than its components.
        """
        check_saved_class(cls, config_dict.get("_class_name"), MODEL_INDEX)
        classes = index_classes(cls, config_dict, MODEL_INDEX)
        found, *rest = super().extract_init_dict(config_dict, **kwargs)
        return {**found, **{name: reference(kind) for name, kind in classes.items() if name in found}}, *rest


def saved_names(kind: type[DiffusionPipeline]) -> set[str]:
    """The names in model_index.json that a pipeline takes as its own."""
    own = {one.__name__ for one in kind.__mro__ if issubclass(one, CheckedPipeline) and one is not CheckedPipeline}
    return own | set(getattr(kind, "saved_as", ()))


def check_saved_class(kind: type[DiffusionPipeline], name: Any, where: str) -> None:
    """Raises a ValueError if a model_index.json is not one of the pipeline's own."""
    if not isinstance(name, str) or name not in saved_names(kind):
        raise ValueError(
            f"{where} is of a {shown(name)}, not of a {kind.__name__}: `diffusers_infogain.load` finds the pipeline for it."
        )


def saved_class(repository: str | os.PathLike[str], **hub: Any) -> str | None:
    """The pipeline class that a repository's model_index.json names, or None if it has no such file.

    Raises:
        ValueError: If the file is no model_index.json.
    """
    folder = Path(repository)
    if not folder.is_dir():
        if folder.exists():
            return None
        folder = local_folder(repository, [MODEL_INDEX], **hub)
    file = folder / MODEL_INDEX
    if not file.exists():
        return None
    name = read_json(file).get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"{file}: `_class_name` must be a string, got {shown(name)}.")
    return name


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that say where on the Hub to look."""
    names = [name for name in inspect.signature(local_folder).parameters if name not in ("repository", "patterns")]
    return {name: arguments[name] for name in names if name in arguments}


def _take_dtype(arguments: dict[str, Any]) -> Dtypes:
    """Takes `dtype`, or `torch_dtype` as it was called, out of the arguments: one for all, or by component; None is as stored.

    Raises:
        TypeError: If both are given.
        ValueError: If it is no dtype.
    """
    if {"dtype", "torch_dtype"} <= arguments.keys():
        raise TypeError("from_pretrained() got both `dtype` and `torch_dtype`, which are one argument by two names")
    value = arguments.pop("dtype", arguments.pop("torch_dtype", None))

    def parsed(one: Any) -> torch.dtype | None:
        dtype = parse_dtype(one)
        return dtype if isinstance(dtype, torch.dtype) else None

    return {str(name): parsed(one) for name, one in value.items()} if isinstance(value, dict) else parsed(value)


def _dtype_of(dtypes: Dtypes, name: str) -> torch.dtype | None:
    return dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes


def _refuse_code(arguments: dict[str, Any]) -> None:
    if arguments.pop("trust_remote_code", False):
        raise ValueError("`trust_remote_code` must be False: no code of a repository is run here, and none is needed.")


def _constructor(kind: Any) -> list[str]:
    return list(inspect.signature(kind.__init__).parameters)[1:]


def load_saved_or_published(
    kind: Any, load_saved: Callable[..., Any], repository: str | os.PathLike[str], arguments: dict[str, Any]
) -> Any:
    """What `kind.from_pretrained` does: a folder that `kind` was saved in by `load_saved`, any other as its publisher's.

    Args:
        load_saved: `DiffusionPipeline.from_pretrained` of the class. Weights are then read from safetensors, unless
            `use_safetensors=False` is among the arguments.

    Raises:
        ValueError: If the repository is of another pipeline.
        TypeError: For an argument that is not for such a repository.
    """
    # Folders and Hub ids of some components are taken as well.
    check_given({name: value for name, value in arguments.items() if not isinstance(value, (str, os.PathLike))})
    for argument in ("variant", "revision"):
        check_type(argument, arguments.get(argument), (str, type(None)), "a string or None")
    hub = hub_arguments(arguments)
    name = saved_class(repository, **hub)
    if name not in saved_names(kind):
        if not hasattr(kind, "open_published") or (name or "").startswith(("InfoGain", "Amused")):
            if name is None:
                raise OSError(f"{os.fspath(repository)} has no {MODEL_INDEX}.")
            check_saved_class(kind, name, str(Path(repository) / MODEL_INDEX))
        return load_published(kind, repository, arguments)
    if Path(repository).is_dir():
        file = Path(repository) / MODEL_INDEX
        index_classes(kind, {**read_json(file), **{name: [None, None] for name in arguments}}, str(file), complete=True)
    arguments = dict(arguments)
    dtype = _take_dtype(arguments)
    _refuse_code(arguments)
    for argument in arguments:
        if argument not in (*SAVED_ARGUMENTS, *_constructor(kind)):
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {argument!r}")
    with one_sentence(os.fspath(repository)):
        pipe = load_saved(repository, **{"use_safetensors": True, **arguments, "dtype": dtype})
    keep_scale_factor(pipe, repository, arguments, hub)
    return pipe


def load_published(kind: Any, repository: str | os.PathLike[str], arguments: dict[str, Any]) -> Any:
    """Opens and loads a repository in its publisher's format.

    Args:
        kind: The pipeline, with `open_published`.
        arguments: `dtype` (or `torch_dtype`), components that are to be taken as they are, None included, and those of
            `open_published`.

    Raises:
        TypeError: For an argument that is not for such a repository.
    """
    arguments = dict(arguments)
    dtype = _take_dtype(arguments)
    _refuse_code(arguments)
    names = _constructor(kind)
    given = {name: arguments.pop(name) for name in names if not isinstance(arguments.get(name, ""), (str, os.PathLike))}
    allowed = {**inspect.signature(kind.open_published).parameters, **inspect.signature(local_folder).parameters}
    for name in arguments:
        if name not in allowed or name == "without":
            also = name in SAVED_ARGUMENTS
            why = f": {str(repository)!r} is not in diffusers' format; `diffusers-infogain convert` writes it in that" * also
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}{why}")
    published = kind.open_published(repository, without=tuple(given), **arguments)
    for name, component in given.items():
        published.models.pop(name, None)
        published.components[name] = component
    return published.load(dtype)
