"""The identity of a pipeline for records: a digest of everything but the scheduler, and the scheduler's settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..components import stored_parts
from ..files import digest
from ..scheduling_infogain import InfoGainScheduler


def pipeline_digest(pipe: Any) -> str:
    """The first half of a SHA-256 of a pipeline's weights, configurations and tokenizers, but not of its scheduler.

    Two pipelines with the same digest generate the same; names of folders and repositories do not count.
    """
    content = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if name != "scheduler":
            content.update(f"{name} {type(component).__name__}\n".encode())
            _add(content, component)
    return content.hexdigest()[:32]


def _add(content: Any, component: Any) -> None:
    config = getattr(component, "config", None)
    if config is not None:
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        content.update(json.dumps(_of_the_model(values), sort_keys=True, default=str).encode())
    if isinstance(component, torch.nn.Module):
        for name, tensor in sorted(component.state_dict().items()):
            content.update(f"{name} {getattr(tensor, 'dtype', '')} {tuple(getattr(tensor, 'shape', ()))}\n".encode())
            for part in stored_parts(tensor) if isinstance(tensor, torch.Tensor) else ():
                content.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif hasattr(component, "get_vocab"):
        backend = getattr(component, "backend_tokenizer", None)
        content.update((json.dumps(component.get_vocab(), sort_keys=True) if backend is None else backend.to_str()).encode())
        content.update(json.dumps([component.chat_template, component.special_tokens_map], sort_keys=True, default=str).encode())


def _of_the_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the path it was loaded from and the version of the library that wrote it."""
    return {name: value for name, value in values.items() if not name.startswith("_") and name != "transformers_version"}


def scheduler_record(scheduler: InfoGainScheduler) -> dict[str, Any]:
    """The settings of a scheduler for records, as JSON returns them, with a digest of the file that `pc_frequencies` names."""
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    frequencies = settings.get("pc_frequencies")
    if frequencies is not None and Path(frequencies).is_file():  # rules that do not read it take any name
        settings["pc_frequencies_digest"] = digest([Path(frequencies)])
    return json.loads(json.dumps(settings))
