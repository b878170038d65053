"""Pipelines that are shared: an index that the Hub can load, and a model card."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from . import __version__
from .checkpoints.errors import one_sentence
from .checkpoints.repository import EMBEDDED_MODELS
from .checks import check_type
from .choices import SAMPLER_DESCRIPTIONS
from .components import unwrapped
from .files import local_path, save_text
from .settings import SETTINGS

CARD = "README.md"

_HUB_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr")

_PROMPTS = {"demo": "a red circle", "demo-text": "S12__34__2_4__3_1"}
"""Prompts for models that know nothing else."""


class SharedPipeline(DiffusionPipeline):
    """A pipeline whose saved folder has a model card, and loads from the Hub."""

    needs_package: ClassVar[bool] = True
    """Whether this package must be installed to load what the pipeline saves."""

    def saved_index(self) -> dict[str, Any]:
        """The content of `model_index.json`."""
        index = json.loads(self.to_json_string())
        if Path(index.get("_name_or_path") or ".").exists():  # says more about the machine than about the model
            index.pop("_name_or_path", None)
        for name, component in self.components.items():
            # From the Hub diffusers downloads only what names its own library or transformers. The pipelines know their classes.
            if component is not None and type(unwrapped(component)).__module__.startswith(f"{__package__}."):
                index[name][0] = "diffusers"
        return index

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes `model_index.json`."""
        Path(json_file_path).write_text(json.dumps(self.saved_index(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the pipeline as diffusers does, with a model card, README.md, unless the folder has one.

        Args:
            save_directory: Folder.
            safe_serialization, variant, max_shard_size: As in `DiffusionPipeline.save_pretrained`.
            push_to_hub: Whether to upload the folder, too.
            kwargs: With `push_to_hub`, `repo_id` (by default the folder's name), `commit_message`, `private`, `token` and
                `create_pr`.
        """
        folder = Path(save_directory)
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if push_to_hub and name in kwargs}
        super().save_pretrained(folder, safe_serialization, variant, max_shard_size, **kwargs)
        name = hub.pop("repo_id", folder.absolute().name)
        if push_to_hub:
            self._upload(folder, name, **hub)
        elif not (folder / CARD).exists():
            write_card(model_card(self, name), folder)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        """Uploads the pipeline to the Hub, with a model card unless the repository has one.

        Args:
            repo_id: Its Hub id.
            commit_message: By default "Upload" and the name of the class.
            private, token, create_pr, safe_serialization, variant: As in `DiffusionPipeline.push_to_hub`.
            subfolder: Folder of the repository, which then gets no model card; by default the repository itself.

        Returns:
            The Hub's `CommitInfo`.
        """
        with TemporaryDirectory() as directory:
            folder = Path(directory, "pipeline")
            super().save_pretrained(folder, safe_serialization, variant)
            return self._upload(folder, repo_id, commit_message, private, token, create_pr, subfolder)

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> Any:
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if subfolder is None and not (folder / CARD).exists():
            write_card(_published_card(repo_id, token) or model_card(self, repo_id), folder)
        return upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            token=token,
            create_pr=create_pr,
            path_in_repo=subfolder,
        )


def _published_card(repo_id: str, token: str | None) -> ModelCard | None:
    """The card that a Hub repository has already."""
    try:
        return ModelCard.load(repo_id, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None


def write_card(card: ModelCard, folder: Path) -> None:
    """Writes the README.md of a folder, atomically."""
    save_text(str(card), folder / CARD)


def licence_of(repository: str | os.PathLike[str]) -> str | None:
    """The licence that the model card of a folder or Hub repository names, or None."""
    path = local_path(EMBEDDED_MODELS.get(os.fspath(repository), repository))
    try:
        if path.exists() and not (path / CARD).is_file():
            return None
        with one_sentence(os.fspath(repository)):
            return ModelCard.load(path / CARD if path.exists() else os.fspath(repository)).data.license
    except (OSError, ValueError):  # without a network, without a card, or with one that is malformed
        return None


def model_card(
    pipe: Any, name: str, *, base_model: str | None = None, license: str | None = None, needs_package: bool | None = None
) -> ModelCard:
    """The model card of a pipeline, for the README.md of its folder.

    Args:
        pipe: The pipeline.
        name: Of the folder or Hub repository, for the lines that load it.
        base_model: Hub id of the repository that the weights come from; by default the one that the pipeline was loaded from.
        license: Identifier of the licence of the weights, as on the Hub, such as "apache-2.0". None: the card says that it is
            that of their source.
        needs_package: Whether the folder needs this package; by default what the pipeline says.

    Raises:
        ValueError: If `base_model` or `license` is no string.
    """
    check_type("base_model", base_model, (str, type(None)), "a Hub id or None")
    check_type("license", license, (str, type(None)), "the identifier of a licence or None")
    card = _Card(pipe, name, pipe.needs_package if needs_package is None else needs_package, license, base_model or _source(pipe))
    return ModelCard(f"---\n{card.data().to_yaml()}\n---\n\n" + "\n\n".join(card.sections()) + "\n")


def _source(pipe: Any) -> str | None:
    """Where the pipeline was loaded from, unless that is a folder of this machine."""
    name = str(pipe.config.get("_name_or_path") or "")
    return name if name and not Path(name).exists() and not Path(name).is_absolute() else None


@dataclass(frozen=True)
class _Card:
    """What `model_card` says of a pipeline."""

    pipe: Any
    name: str
    needs_package: bool
    license: str | None
    source: str | None

    @property
    def of_text(self) -> bool:
        return "model" in self.pipe.components

    @property
    def of_classes(self) -> bool:
        return not self.of_text and "class_labels" in self.pipe.recorded_inputs

    @property
    def on_hub(self) -> bool:
        return self.source is not None and "/" in self.source

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        models = (unwrapped(component) for component in self.pipe.components.values())
        dtypes = (getattr(model, "dtype", None) for model in models)
        return next((dtype for dtype in dtypes if isinstance(dtype, torch.dtype)), torch.float32)

    def data(self) -> ModelCardData:
        return ModelCardData(
            base_model=self.source if self.on_hub else None,
            library_name="diffusers",
            license=self.license,
            pipeline_tag="text-generation" if self.of_text else None if self.of_classes else "text-to-image",
            tags=["masked-diffusion", "info-gain", "diffusers_infogain"],
        )

    def sections(self) -> list[str]:
        """Without what components that are None would tell."""
        components = [component for name, component in self.pipe.components.items() if name != "scheduler"]
        complete = all(component is not None for component in self.pipe.components.values())
        return [
            f"# {self.name.rpartition('/')[2]}",
            self.introduction(),
            *(["## Run it", *self.how_to_run()] if complete else []),
            *(["## Sampler", *self.sampler()] if self.pipe.scheduler is not None else []),
            *(["## Parts", self.parts()] if any(component is not None for component in components) else []),
            "## Licence",
            self.licence(),
        ]

    def introduction(self) -> str:
        family = (self.pipe.config.family or {}).get("name", "text") if self.of_text else " or ".join(self.pipe.families)
        origin = f" Its weights come from [{self.source}](https://huggingface.co/{self.source})." if self.on_hub else ""
        origin = f" It is the model `{self.source}` of diffusers_infogain." if self.source in _PROMPTS else origin
        what = "text" if self.of_text else "images of classes" if self.of_classes else "images from text"
        return f"A masked diffusion model ({family}) for {what}, decoded by diffusers_infogain {__version__}.{origin}"

    def how_to_run(self) -> list[str]:
        """A sentence, and the code."""
        arguments = f'"{self.name}"'
        if self.needs_package:
            said = "With the package diffusers_infogain. The name is that of this folder, or its Hub id."
            lines = ["import diffusers_infogain", "", f"pipe = diffusers_infogain.load({arguments})"]
        else:
            said = (
                "With diffusers and transformers; no other package is needed. The name is that of this folder, or its Hub id. "
                "`trust_remote_code=True` runs `pipeline.py` and the modules beside it, all of the code: read them first."
            )
            arguments += f", custom_pipeline={arguments}, trust_remote_code=True"
            if self.dtype != torch.float32:
                arguments += f", dtype={self.dtype}"
            lines = [*(["import torch"] if self.dtype != torch.float32 else []), "from diffusers import DiffusionPipeline", ""]
            lines.append(f"pipe = DiffusionPipeline.from_pretrained({arguments})")
        return [said, "\n".join(["```python", *lines, *self.call(), "```"])]

    def call(self) -> list[str]:
        if self.of_text and self.source in _PROMPTS:
            return [f'print(pipe("{_PROMPTS[self.source]}", max_new_tokens=0).texts[0])']
        if self.of_text:
            return ['print(pipe("Once upon a time", max_new_tokens=64).texts[0])']
        prompt = "golden retriever" if self.of_classes else _PROMPTS.get(self.source or "", "a photo of a red fox in the snow")
        return [f'image = pipe("{prompt}").images[0]', 'image.save("image.png")']

    def sampler(self) -> list[str]:
        """What it is, and a table of the settings that differ from the defaults."""
        config = self.pipe.scheduler.config
        described = SAMPLER_DESCRIPTIONS.get(config.sampler)
        said = f"`{config.sampler}`" + (f": {described}." if described else ".")
        if not self.of_text:
            steps, guidance = self.pipe.default_num_inference_steps, self.pipe.default_guidance_scale
            said += f" Calls take `num_inference_steps={steps}` and `guidance_scale={guidance:g}` unless they say otherwise."
        values = {name: config[name] for name in SETTINGS if name in config}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        rows = [f"| `{name}` | `{value!r}` |" for name, value in values.items() if value != SETTINGS[name].default]
        table = ["These settings differ from the defaults:", "\n".join(["| setting | value |", "|---|---|", *rows])]
        change = (
            "The docstring of the scheduler describes all settings, and its `from_config` changes them: "
            '`pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, sampler="confidence")`.'
        )
        return [said, *(table if rows else ["All its settings are the defaults."]), change]

    def parts(self) -> str:
        rows = []
        for name, component in self.pipe.components.items():
            if component is None or name == "scheduler":
                continue
            model = unwrapped(component)
            size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters" if hasattr(model, "parameters") else ""
            rows.append(f"| `{name}` | `{type(model).__name__}` | {size} |")
        return "\n".join(["| part | class | size |", "|---|---|---|", *rows])

    def licence(self) -> str:
        weights = f"The weights are under {self.license}." if self.license else "The weights keep the licence of their source."
        code = "" if self.needs_package else f" The code is part of diffusers_infogain {__version__}, under Apache-2.0."
        return weights + code
