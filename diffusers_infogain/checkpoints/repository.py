"""Repositories: folders, or Hub repositories, and what their small files tell about the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checks import shown
from ..files import local_path, quoted, read_json

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"

_DEMO = Path(__file__).parents[1] / "demo"
EMBEDDED_MODELS = {"demo": str(_DEMO / "model"), "demo-text": str(_DEMO / "text_model")}
"""Folders of the models that ship with the package, by the names that stand for them."""


@dataclass(frozen=True)
class HubArguments:
    """Where on the Hub to look, as in `huggingface_hub.snapshot_download`; local folders need none of it."""

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    @classmethod
    def names(cls) -> list[str]:
        """The names of the arguments."""
        return [field.name for field in fields(cls)]

    @classmethod
    def given(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The Hub's arguments among those of a call, which may have others."""
        return {name: arguments[name] for name in cls.names() if name in arguments}


def local_folder(repository: str | os.PathLike[str], patterns: Sequence[str], hub: HubArguments | None = None) -> Path:
    """The folder of that name, or a download of some files of a Hub repository.

    Args:
        repository: Folder or Hub id.
        patterns: Names of the files to download, with wildcards.
        hub: Where on the Hub to look.

    Raises:
        OSError: If there is no such folder and nothing of that name can be downloaded.
    """
    path = local_path(repository)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        options = asdict(hub or HubArguments())
        return Path(snapshot_download(os.fspath(repository), allow_patterns=list(patterns), **options))
    except (HFValidationError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise OSError(f"{quoted(repository)} is neither a folder nor a Hub repository that can be read: {reason}") from error


@dataclass(frozen=True)
class Repository:
    """What pipelines look at to recognise their models. Files are read, or downloaded, once and only when asked for.

    Attributes:
        name: Folder, file, Hub id, or one of `EMBEDDED_MODELS`, as the user gave it.
        hub: Where on the Hub to look.
    """

    name: str | os.PathLike[str]
    hub: HubArguments = HubArguments()

    @property
    def path(self) -> Path:
        """The name as a local path, whether or not it exists.

        Raises:
            OSError: As `files.local_path`.
        """
        return local_path(EMBEDDED_MODELS.get(os.fspath(self.name), self.name))

    @cached_property
    def folder(self) -> Path | None:
        """The folder that holds model_index.json or config.json; None if the repository is a single file.

        Raises:
            OSError: If there is no such repository.
        """
        if self.path.exists() and not self.path.is_dir():
            return None
        return local_folder(self.path if self.path.is_dir() else self.name, [MODEL_INDEX, CONFIG], self.hub)

    def _read(self, name: str) -> dict[str, Any] | None:
        return read_json(self.folder / name) if self.folder is not None and (self.folder / name).exists() else None

    @cached_property
    def index(self) -> dict[str, Any] | None:
        """The content of model_index.json, or None without one.

        Raises:
            ValueError: If it is not a JSON object.
        """
        return self._read(MODEL_INDEX)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The content of config.json, or None without one or if there is a model_index.json, which then describes the model.

        Raises:
            ValueError: If it is not a JSON object.
        """
        return self._read(CONFIG) if self.index is None else None

    @property
    def class_name(self) -> str | None:
        """The pipeline class that model_index.json names, or None without such a file.

        Raises:
            ValueError: If the field is not a string.
        """
        if self.index is None:
            return None
        name = self.index.get("_class_name")
        if not isinstance(name, str):
            raise ValueError(f"{self.path / MODEL_INDEX}: `_class_name` must be a string, got {shown(name)}.")
        return name

    @property
    def description(self) -> str:
        """What there is to recognise a model by, for errors."""
        if self.index is not None:
            return f"a {MODEL_INDEX} for {shown(self.class_name)}"
        if self.config is not None:
            return f"a {CONFIG} with the model type {shown(self.config.get('model_type'))}"
        return f"neither {MODEL_INDEX} nor {CONFIG}"
