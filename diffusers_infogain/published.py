"""Checkpoints in their publishers' formats as pipelines: loaded as they are, or written as a diffusers folder."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from .components import keep_scale_factor
from .files import read_json
from .models.checkpoint import SHARD_SIZE, ModelSource, local_folder

MODEL_INDEX = "model_index.json"


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

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The pipeline with its weights; `dtype` None keeps them as they are stored."""
        models = {name: source.load(dtype) for name, source in self.models.items()}
        return self.pipeline(**models, **self.components)

    def write(self, target: Path, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> dict[str, int]:
        """Writes a diffusers folder in safetensors and tests it; returns the bytes by model.

        At most one shard is in memory while writing, and one model while testing. `target` appears when everything is done and
        tested; until then a hidden folder beside it grows, which an error or an interruption by the user removes.

        Raises:
            ValueError: If `target` exists, a tensor is missing, extra or misshapen, or a written model computes something else
                than the original.
        """
        if target.exists():
            raise ValueError(f"The target {str(target)!r} must not exist yet.")
        for source in self.models.values():
            _ = source.keys  # all of them are checked before anything is written
        target.parent.mkdir(parents=True, exist_ok=True)
        sizes = {}
        with _folder_in_place(target) as folder, tqdm(total=2 * len(self.models), desc="convert", unit="part") as progress:
            for name, source in self.models.items():
                (folder / name).mkdir()
                progress.set_postfix_str(f"writing {name}")
                sizes[name] = source.write(folder / name, dtype, shard_size)
                progress.update()
            skeletons = {name: source.skeleton for name, source in self.models.items()}
            pipe = self.pipeline(**skeletons, **self.components)
            pipe.save_config(folder)
            for name, component in self.components.items():
                if hasattr(component, "save_pretrained"):
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
    """A folder that becomes `target` when the block ends without an exception."""
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def saved_class(repository: str | os.PathLike[str], **hub: Any) -> str | None:
    """The pipeline class that a repository's model_index.json names, or None if it has no such file."""
    folder = Path(repository)
    if not folder.is_dir():
        if folder.exists():
            return None
        folder = local_folder(repository, [MODEL_INDEX], **hub)
    file = folder / MODEL_INDEX
    return read_json(file).get("_class_name") if file.is_file() else None


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that say where on the Hub to look."""
    names = [name for name in inspect.signature(local_folder).parameters if name not in ("repository", "patterns")]
    return {name: arguments[name] for name in names if name in arguments}


def load_saved_or_published(
    kind: Any, load_saved: Callable[..., Any], repository: str | os.PathLike[str], arguments: dict[str, Any]
) -> Any:
    """What `kind.from_pretrained` does: a folder that `kind` was saved in by `load_saved`, any other as its publisher's.

    Args:
        load_saved: `DiffusionPipeline.from_pretrained` of the class. Weights are then read from safetensors, unless
            `use_safetensors=False` is among the arguments.
    """
    hub = hub_arguments(arguments)
    if saved_class(repository, **hub) == kind.__name__:
        pipe = load_saved(repository, **{"use_safetensors": True, **arguments})
        keep_scale_factor(pipe, repository, arguments, hub)
        return pipe
    return load_published(kind.open_published, repository, **arguments)


def load_published(open_published: Callable[..., PublishedPipeline], repository: str | os.PathLike[str], **arguments: Any) -> Any:
    """Opens and loads a repository in its publisher's format; `dtype` (or `torch_dtype`) and `scheduler` as in `from_pretrained`.

    Raises:
        TypeError: For an argument that is not for such a repository.
    """
    old_dtype = arguments.pop("torch_dtype", None)
    dtype, scheduler = arguments.pop("dtype", old_dtype), arguments.pop("scheduler", None)
    allowed = {**inspect.signature(open_published).parameters, **inspect.signature(local_folder).parameters}
    for name in arguments:
        if name not in allowed:
            raise TypeError(
                f"from_pretrained() got an unexpected keyword argument {name!r}: {str(repository)!r} is not in "
                "diffusers' format; `diffusers-infogain convert` writes it in that."
            )
    published = open_published(repository, **arguments)
    if scheduler is not None:
        published.components["scheduler"] = scheduler
    return published.load(dtype)
