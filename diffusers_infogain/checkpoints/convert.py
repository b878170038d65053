"""Conversion of published checkpoints: a diffusers folder in safetensors, complete, checked and tested, or nothing at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import local_path, writing
from ..model_cards import model_card, write_card
from ..output_folders import folder_in_place
from ..progress import Progress
from .errors import writing_natively
from .published import CheckedPipeline, PublishedPipeline
from .repository import EMBEDDED_MODELS, MODEL_INDEX, Repository
from .source import SHARD_SIZE, ModelSource


@dataclass(frozen=True)
class ConvertedModel:
    """The size of a converted model: its tensors, its parameters, and the bytes of its weight files."""

    num_tensors: int
    num_parameters: int
    num_bytes: int


def convert(
    cls: type[CheckedPipeline],
    source: str | os.PathLike[str],
    target: Path,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
    **options: Any,
) -> dict[str, ConvertedModel]:
    """Converts a published checkpoint to a folder in diffusers' format; returns the size of each model in it.

    Args:
        cls: The pipeline that runs it.
        source: Folder, file or Hub id.
        target: The folder to write, which must not exist.
        dtype: Of the written weights; None keeps the stored one.
        shard_size: Largest size of a weight file, in bytes, unless a single tensor is larger.
        options: As in `cls.open_published`.

    Raises:
        ValueError: If `source` is in diffusers' format already, or as in `write_pipeline`.
        OSError: If something cannot be read or written.
    """
    if os.fspath(source) in EMBEDDED_MODELS or cls.is_saved(Repository(source)):
        raise ValueError(f"{os.fspath(source)!r} is a diffusers folder for {cls.__name__} already: load it as it is.")
    base_model = None if local_path(source).exists() else os.fspath(source)
    return write_pipeline(cls.open_published(source, **options), target, dtype, shard_size, base_model)


def write_pipeline(
    published: PublishedPipeline,
    target: Path,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
    base_model: str | None = None,
) -> dict[str, ConvertedModel]:
    """Writes a pipeline as a diffusers folder with a model card, and tests what was written.

    At most one shard is in memory while writing, and one model while testing. `target` appears once everything is written and
    tested. Until then a hidden folder beside it grows, which is removed after an error or an interruption; if the process was
    killed, the next run empties and reuses it.

    Raises:
        ValueError: If `target` exists or another process is writing it, if a tensor is missing, unexpected or misshapen, or if
            a written model does not reproduce the outputs of the original.
        OSError: If something cannot be written, naming it.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"The target {str(target)!r} must not exist yet.")
    published.check()
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    models = published.models
    sizes = {}
    with folder_in_place(target) as folder, Progress(total=2 * len(models), desc="convert", unit="part") as progress:
        for name, source in models.items():
            (folder / name).mkdir()
            progress.set_postfix_str(f"writing {name}")
            num_bytes = source.write(folder / name, dtype, shard_size)
            num_parameters = sum(parameter.numel() for parameter in source.skeleton.parameters())
            sizes[name] = ConvertedModel(len(source.keys), num_parameters, num_bytes)
            progress.update()
        skeletons = {name: source.skeleton for name, source in models.items()}
        pipe = published.pipeline(**skeletons, **published.components)
        with writing_natively(folder / MODEL_INDEX):
            pipe.save_config(folder)
        write_card(model_card(pipe, target.absolute().name, base_model=base_model), folder)
        for name, component in published.components.items():
            if hasattr(component, "save_pretrained"):
                with writing_natively(folder / name):
                    component.save_pretrained(folder / name)
        for name, source in models.items():
            progress.set_postfix_str(f"testing {name}")
            _compare(name, source, folder / name, dtype)
            progress.update()
    return sizes


def _compare(name: str, source: ModelSource, folder: Path, dtype: torch.dtype | None) -> None:
    """Raises a ValueError unless the written model has the published weights, bit for bit, and reproduces the outputs."""
    model = source.load(dtype)
    model_class, stored_dtype, expected = type(model), model.dtype, source.probe(model)
    del model  # one model in memory at a time
    written = model_class.from_pretrained(folder, dtype=stored_dtype).eval()
    weights = written.state_dict()
    different = [key for key, value in source.tensors(dtype) if not torch.equal(weights[key], value)]
    if different:
        raise ValueError(f"The converted {name} has other weights than the original, such as {different[0]}.")
    # Rounding depends on where in memory weights lie.
    tolerance = 64 * torch.finfo(stored_dtype).eps * expected.abs().max().item()
    difference = (expected.float() - source.probe(written).float()).abs().max().item()
    if not difference <= tolerance:
        raise ValueError(f"The converted {name} does not reproduce the original outputs: they differ by up to {difference:g}.")
