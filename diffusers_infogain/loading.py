"""`load` for every supported model, and the pipeline class for a repository."""

from __future__ import annotations

import os
from typing import Any

from .checkpoints.published import CheckedPipeline
from .checkpoints.repository import HubArguments, Repository
from .pipeline_infogain import InfoGainPipeline
from .pipeline_infogain_lumina import InfoGainLuminaPipeline
from .pipeline_infogain_maskgen import InfoGainMaskGenPipeline
from .pipeline_infogain_maskgit import InfoGainMaskGITPipeline
from .pipeline_infogain_meissonic import InfoGainMeissonicPipeline
from .pipeline_infogain_mmada import InfoGainMMaDAPipeline
from .pipeline_infogain_showo import InfoGainShowoPipeline
from .pipeline_infogain_text import InfoGainTextPipeline
from .pipeline_infogain_titok import InfoGainTiTokPipeline

IMAGE_PIPELINES: tuple[type[CheckedPipeline], ...] = (
    InfoGainMaskGITPipeline,  # first: its repositories are recognised without a download
    InfoGainTiTokPipeline,
    InfoGainMaskGenPipeline,
    InfoGainPipeline,
    InfoGainMMaDAPipeline,
    InfoGainShowoPipeline,
    InfoGainMeissonicPipeline,
    InfoGainLuminaPipeline,
)
PIPELINES: tuple[type[CheckedPipeline], ...] = (*IMAGE_PIPELINES, InfoGainTextPipeline)


def pipeline_class(repository: str | os.PathLike[str], **hub: Any) -> type[CheckedPipeline]:
    """The pipeline for a repository: the first that recognises it. Nothing of the repository is run.

    MMaDA, which generates text too, is an image model here.

    Args:
        repository: "demo", "demo-text", a folder, a Hub id, or a MaskGIT's or TiTok's weight file.
        hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: If no pipeline recognises it, saying what was found.
        OSError: If there is no such repository.
    """
    opened = Repository(repository, HubArguments(**hub))
    for cls in PIPELINES:
        if cls.recognises(opened):
            return cls
    name = os.fspath(repository)
    if opened.folder is None:
        raise ValueError(f"{name!r} is a file: give the folder of the checkpoint, or a MaskGIT's or TiTok's weight file.")
    images = ", ".join(family for cls in IMAGE_PIPELINES for family in cls.families)
    raise ValueError(
        f"Cannot tell the model family of {name!r}, which has {opened.description}: supported are {images}, and for text "
        f"{', '.join(InfoGainTextPipeline.families)}."
    )


def image_pipeline_class(repository: str | os.PathLike[str], **hub: Any) -> type[CheckedPipeline]:
    """As `pipeline_class`, for image models only.

    Raises:
        ValueError: Also for a text model.
    """
    cls = pipeline_class(repository, **hub)
    if cls is InfoGainTextPipeline:
        raise ValueError(
            f"{os.fspath(repository)!r} is a text model: use it with `diffusers-infogain text` or `InfoGainTextPipeline`."
        )
    return cls


def load(pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Loads the pipeline of any supported model, from its publisher's format or from a diffusers folder.

    MMaDA is loaded to generate images; `InfoGainTextPipeline.from_pretrained` loads it to generate text.

    Args:
        pretrained_model_name_or_path: "demo", "demo-text", a folder, a Hub id, or a MaskGIT's or TiTok's weight file.
        kwargs: As in the pipeline's `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: For a repository of an unknown family, or weights with a missing, unexpected or misshapen tensor.
        OSError: If there is no such repository.
    """
    cls = pipeline_class(pretrained_model_name_or_path, **HubArguments.given(kwargs))
    return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
