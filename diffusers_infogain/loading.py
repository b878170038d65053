"""One way to load every kind of model: `load`; and what kind a repository is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .checkpoints.published import MODEL_INDEX, hub_arguments
from .checkpoints.repository import local_folder
from .files import read_json
from .models.text import is_text_model
from .pipeline_infogain import InfoGainPipeline
from .pipeline_infogain_lumina import PUBLISHED_CLASS, InfoGainLuminaPipeline
from .pipeline_infogain_maskgit import InfoGainMaskGITPipeline
from .pipeline_infogain_meissonic import InfoGainMeissonicPipeline
from .pipeline_infogain_mmada import InfoGainMMaDAPipeline
from .pipeline_infogain_text import InfoGainTextPipeline
from .printing import shown

IMAGE_PIPELINES: tuple[type[DiffusionPipeline], ...] = (
    InfoGainPipeline,
    InfoGainMMaDAPipeline,
    InfoGainMaskGITPipeline,
    InfoGainMeissonicPipeline,
    InfoGainLuminaPipeline,
)


def pipeline_class(repository: str | os.PathLike[str], **hub: Any) -> type[DiffusionPipeline]:
    """The pipeline for a repository, by its files; nothing of the repository is run.

    Args:
        repository: "demo", "demo-text", a folder, a Hub id, or a MaskGIT's weight file.
        hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: If it is of no family that is known here, saying what it is.
        OSError: If there is no such repository.
    """
    if repository in ("demo", "demo-text"):
        return InfoGainPipeline if repository == "demo" else InfoGainTextPipeline
    if InfoGainMaskGITPipeline.is_published(repository):
        return InfoGainMaskGITPipeline
    if Path(repository).is_file():
        raise ValueError(f"{os.fspath(repository)!r} is a file: give the folder of the checkpoint, or a MaskGIT's .pth file.")
    folder = local_folder(repository, [MODEL_INDEX, "config.json"], **hub)
    found = "neither model_index.json nor config.json"
    if (folder / MODEL_INDEX).is_file():
        index = read_json(folder / MODEL_INDEX)
        name = index.get("_class_name")
        if name == "AmusedPipeline":
            return InfoGainPipeline
        for kind in (*IMAGE_PIPELINES, InfoGainTextPipeline):
            if name == kind.__name__:
                return kind
        if name == PUBLISHED_CLASS:
            return InfoGainLuminaPipeline
        if InfoGainMeissonicPipeline.is_published(index):
            return InfoGainMeissonicPipeline
        found = f"a {MODEL_INDEX} for {shown(name)}"
    elif (folder / "config.json").is_file():
        settings = read_json(folder / "config.json")
        name = settings.get("model_type")
        if name == "mmada":  # writes text as well
            return InfoGainMMaDAPipeline
        if is_text_model(settings):
            return InfoGainTextPipeline
        found = f"a config.json with the model type {shown(name)}"
    raise ValueError(
        f"{os.fspath(repository)!r} is of no family that is known here: aMUSEd, MMaDA, MaskGIT (Halton), Meissonic, Monetico or "
        f"Lumina-DiMOO; for text LLaDA, Dream, SDAR, TraDo, A2D or an AutoModelForMaskedLM. It has {found}."
    )


def image_pipeline_class(repository: str | os.PathLike[str], **hub: Any) -> type[DiffusionPipeline]:
    """As `pipeline_class`, of image models only.

    Raises:
        ValueError: Also for a text model.
    """
    kind = pipeline_class(repository, **hub)
    if kind is InfoGainTextPipeline:
        raise ValueError(
            f"{os.fspath(repository)!r} is a text model: `diffusers-infogain text` and `InfoGainTextPipeline` write with it."
        )
    return kind


def load(pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The pipeline of any model that is known here, from its publisher's format or from a diffusers folder.

    MMaDA is loaded to make images; `InfoGainTextPipeline.from_pretrained` loads its language side.

    Args:
        pretrained_model_name_or_path: "demo", "demo-text", a folder, a Hub id, or a MaskGIT's weight file.
        kwargs: As in the pipeline's `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: For a repository of another kind, or weights with a missing, extra or misshapen tensor.
        OSError: If there is no such repository.
    """
    kind = pipeline_class(pretrained_model_name_or_path, **hub_arguments(kwargs))
    return kind.from_pretrained(pretrained_model_name_or_path, **kwargs)
