"""The base class of pipelines in exported repositories, in place of `published`: they load from diffusers' format only."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

# diffusers looks for these names in a component's module to find out how to load it.
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: F401

from ..model_cards import SharedPipeline

_CLASSES: dict[str, type] = {}


class CheckedPipeline(SharedPipeline):
    """A pipeline whose code comes with its weights. What it saves can be loaded without any package, too."""

    families: ClassVar[tuple[str, ...]]
    """Names of the models that the pipeline runs."""
    code: ClassVar[tuple[str, ...]] = ()
    """The modules of its code beside `pipeline.py`."""
    needs_package: ClassVar[bool] = False

    def save_config(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes `model_index.json`, and the code beside it."""
        super().save_config(save_directory, **kwargs)
        for name in ("pipeline", *self.code):
            source, target = Path(__file__).with_name(f"{name}.py"), Path(save_directory, f"{name}.py")
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """As in diffusers, which loads the components that are found here: the repository's own classes from its code."""
        found, *rest = super().extract_init_dict(config_dict, **kwargs)
        entries = {name: entry for name, entry in found.items() if isinstance(entry, (list, tuple))}
        own = {name: (__name__, entry[1]) for name, entry in entries.items() if entry[1] in _CLASSES}
        return {**found, **own}, *rest


def as_exported(pipeline: type[CheckedPipeline], code: tuple[str, ...], components: tuple[type, ...]) -> None:
    """Tells a pipeline its code.

    Args:
        pipeline: The class.
        code: The modules beside `pipeline.py`.
        components: The classes of its components that are defined there.
    """
    pipeline.code = code
    for component in components:
        _CLASSES[component.__name__] = component
        if issubclass(component, SchedulerMixin):
            _CLASSES["AmusedScheduler"] = component  # reads the other's configuration


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return _CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
