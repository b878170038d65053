"""Pipelines as repositories that run without this package: weights, code and a model card."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints.errors import writing_natively
from .checkpoints.repository import MODEL_INDEX
from .checkpoints.saved import OWN_CLASSES
from .checks import check_type
from .components import check_components, unwrapped
from .exported_code import ENTRY, PACKAGE, entry_module, flat_modules
from .files import save_text, writing
from .loading import PIPELINES
from .model_cards import model_card, write_card
from .output_folders import folder_in_place
from .rules import RULES, SAMPLERS

_LIBRARIES = ("diffusers", "transformers", PACKAGE.name)


@dataclass(frozen=True)
class Export:
    """What an export consists of.

    Attributes:
        modules: The files of its code, in the order of their names.
        code_bytes: Their size.
        num_bytes: The size of the repository.
    """

    modules: tuple[str, ...]
    code_bytes: int
    num_bytes: int


def export_pipeline(
    pipe: Any,
    folder: str | os.PathLike[str],
    *,
    license: str | None = None,
    base_model: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Export:
    """Writes a pipeline as a repository that runs without this package.

    `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)` loads it, with the scheduler's
    settings, and so does `load`, which runs none of its code. The folder appears once everything is written.

    Args:
        pipe: A pipeline of this package, with all its components.
        folder: The folder to write, which must not exist.
        license: Identifier of the licence of the weights for the model card, as on the Hub, such as "apache-2.0".
        base_model: Hub id of the repository that the weights come from; by default the one that the pipeline was loaded from.
        max_shard_size: Largest size of a weight file.

    Raises:
        ValueError: If the folder exists, or the pipeline needs something that cannot be exported: code of others, such as a rule
            or a model, a file of token frequencies, or LoRA layers that are not fused.
        OSError: If something cannot be written.
    """
    check_type("folder", folder, (str, os.PathLike), "a path")
    target = Path(folder)
    files = pipeline_code(pipe)
    card = model_card(pipe, target.absolute().name, base_model=base_model, license=license, needs_package=False)
    if target.exists() or target.is_symlink():
        raise ValueError(f"The folder {str(target)!r} must not exist yet.")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with folder_in_place(target) as part:
        write_card(card, part)
        with writing_natively(part):
            pipe.save_pretrained(part, max_shard_size=max_shard_size)
        for name, text in files.items():
            save_text(text, part / name)
        for path in (part / MODEL_INDEX, *part.glob("*/config.json")):
            _forget_origin(path)
    sizes = {path.relative_to(target).as_posix(): path.stat().st_size for path in target.rglob("*") if path.is_file()}
    return Export(tuple(files), sum(sizes[name] for name in files), sum(sizes.values()))


def _forget_origin(path: Path) -> None:
    """Removes where a pipeline or a model was loaded from, which may be a folder of this machine, from its configuration."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    save_text(json.dumps(config, indent=2, sort_keys=True) + "\n", path)


def pipeline_code(pipe: Any) -> dict[str, str]:
    """The source of `pipeline.py` and of the modules beside it, by file name.

    Raises:
        ValueError: If the pipeline cannot be exported.
    """
    cls = type(pipe)
    if cls not in PIPELINES:
        known = ", ".join(known.__name__ for known in PIPELINES)
        raise ValueError(f"`pipe` must be one of {known} to be exported, got {cls.__name__}.")
    check_components(pipe, *pipe.components)
    own = {(_below(cls), cls.__name__)}
    for name, component in pipe.components.items():
        own |= _own_class(name, component)
    _check_scheduler(pipe.scheduler)
    everything = [(_below(known), known.__name__) for known in PIPELINES]
    everything += [(module, name) for name, module in OWN_CLASSES.items()]
    needed = [*own, ("checkpoints.standalone", "as_exported")]
    files = flat_modules(needed, everything)
    pipeline = (_below(cls), cls.__name__)
    return {ENTRY: entry_module(pipeline, own - {pipeline}, files), **files}


def _below(cls: type) -> str:
    return cls.__module__.partition(".")[2]


def _own_class(name: str, component: Any) -> set[tuple[str, str]]:
    """Module and name of the class of a component, if it is the package's own."""
    model = unwrapped(component)
    library = type(model).__module__.partition(".")[0]
    if library not in _LIBRARIES:
        raise ValueError(f"`{name}` must be of a class of {', '.join(_LIBRARIES)} to be exported, got {type(model).__name__}.")
    if getattr(model, "peft_config", None):
        raise ValueError(f"`{name}` must not have LoRA layers of its own to be exported: fuse them first.")
    return {(_below(type(model)), type(model).__name__)} if library == PACKAGE.name else set()


def _check_scheduler(scheduler: Any) -> None:
    config = scheduler.config
    if config.pc_frequencies is not None:
        raise ValueError(f"`pc_frequencies` must be None to export a pipeline, got the file {config.pc_frequencies!r}.")
    for setting, registered in (("sampler", SAMPLERS), ("certainty", RULES)):
        name = config[setting]
        rules = [RULES[name]] if name in RULES else []
        if name not in registered or any(not rule.phi.__module__.startswith(f"{PACKAGE.name}.") for rule in rules):
            raise ValueError(f"`{setting}` must be one of this package's to export a pipeline, got {name!r}.")
