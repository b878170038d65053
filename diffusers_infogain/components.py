"""Components of a pipeline: checks, and those that are None, compiled, offloaded or in half precision."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import SchedulerMixin, VQModel
from diffusers.utils.torch_utils import is_compiled_module
from transformers import PreTrainedTokenizerBase

from .checks import check_type
from .scheduling_infogain import InfoGainScheduler

PUBLISHED_SCALE_FACTOR = 16
"""Pixels per token along one side, of all published models of these pipelines."""

_TOKENIZERS = threading.Lock()


def converted_scheduler(scheduler: Any) -> Any:
    """An `AmusedScheduler` as an `InfoGainScheduler`; anything else as it is."""
    # Recognised by name, because diffusers has deprecated aMUSEd and may drop the class.
    if not any(base.__name__ == "AmusedScheduler" for base in type(scheduler).__mro__):
        return scheduler
    # With this key, `from_config` would drop values that were given by position, as if they were defaults.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return InfoGainScheduler.from_config(config)


def check_scheduler(scheduler: Any) -> InfoGainScheduler:
    """Returns the scheduler of a pipeline if it can run it.

    Raises:
        ValueError: If it is not an `InfoGainScheduler`.
    """
    if not isinstance(scheduler, InfoGainScheduler):
        raise ValueError(
            f"`scheduler` must be an InfoGainScheduler or an AmusedScheduler, got {type(scheduler).__name__}: "
            "InfoGainScheduler.from_config(...) converts an AmusedScheduler's config."
        )
    return scheduler


def as_infogain_scheduler(scheduler: Any) -> Any:
    """An `InfoGainScheduler` as it is, an `AmusedScheduler` converted; None stays None.

    Raises:
        ValueError: For any other scheduler.
    """
    scheduler = converted_scheduler(scheduler)
    return None if scheduler is None else check_scheduler(scheduler)


def check_components(pipe: Any, *names: str) -> None:
    """Raises a ValueError that names the first of these components that is None."""
    for name in names:
        if getattr(pipe, name) is None:
            hint = ' (none is needed for `output_type="latent"`)' if name == "vqvae" else ""
            raise ValueError(f"The pipeline's `{name}` must not be None for this call{hint}: set `pipe.{name}`.")


def check_component_types(components: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the first model, scheduler or tokenizer of another type; None is allowed."""
    for name, value in components.items():
        if value is not None and name in ("vqvae", "text_encoder", "transformer", "model"):
            check_type(name, value, torch.nn.Module, "a model (torch.nn.Module) or None")
        elif value is not None and name == "scheduler":
            check_type(name, value, SchedulerMixin, "a scheduler or None")
        elif value is not None and name == "tokenizer":
            check_type(name, value, PreTrainedTokenizerBase, "a tokenizer of transformers or None")


def tokenize(tokenizer: Any, text: Any, **options: Any) -> Any:
    """Calls a tokenizer, one thread at a time, and leaves it as it was.

    Fast tokenizers store their padding and truncation between calls, so concurrent calls would get each other's, and a tokenizer
    that was called would be saved, and identified, as another one.
    """
    with _TOKENIZERS:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return tokenizer(text, **options)
        padding, truncation = backend.padding, backend.truncation
        try:
            return tokenizer(text, **options)
        finally:
            backend.no_padding() if padding is None else backend.enable_padding(**padding)
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)


def unwrapped(model: Any) -> Any:
    """The model itself, where `torch.compile` may have wrapped it."""
    return model._orig_mod if is_compiled_module(model) else model


def scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels along one side of what a token of an image tokenizer with this configuration belongs to: a cell, or the image."""
    if "image_size" in config:
        return int(config["image_size"])
    levels = config.get("block_out_channels") or config["encoder_multipliers"]
    return 2 ** (len(levels) - 1)


def keep_scale_factor(
    pipe: Any, repository: str | os.PathLike[str], arguments: Mapping[str, Any], hub: Mapping[str, Any]
) -> None:
    """Sets the pixels per token of a pipeline that was loaded without its image tokenizer, from the tokenizer's saved config."""
    if "vqvae" in arguments and arguments["vqvae"] is None:
        try:
            config = VQModel.load_config(repository, subfolder="vqvae", **hub)
        except OSError:  # saved without one
            return
        pipe.vae_scale_factor = scale_factor(config)


def stored_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that are kept for one: itself, or of one that torchao quantised integers, scales and the like."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in stored_parts(getattr(tensor, name))]


def in_float32(model: Any, needed: bool = True) -> Any:
    """The model in float32, for decoders that overflow or blur in half precision.

    Returns the model itself if it is in float32, quantised, or `needed` is False. Otherwise it returns a copy for this call,
    because threads and pipelines share the model, which must not change.
    """
    plain = unwrapped(model)
    parameters = list(plain.parameters())
    floating = all(parameter.is_floating_point() and len(stored_parts(parameter)) == 1 for parameter in parameters)
    if not needed or not floating or all(parameter.dtype == torch.float32 for parameter in parameters):
        return model
    hook = getattr(plain, "_hf_hook", None)
    if hook is not None:  # offloaded: the model that ran before makes room
        hook.pre_forward(plain)
    offloaded = any(parameter.is_meta for parameter in parameters)
    weights = get_state_dict_offloaded_model(plain) if offloaded else plain.state_dict()
    device = next((parameter.device for parameter in plain.parameters() if not parameter.is_meta), torch.device("cpu"))
    device = getattr(hook, "execution_device", None) or device
    with torch.device("meta"):
        twin = type(plain).from_config(plain.config)
    converted = {
        name: weight.to(device, torch.float32 if weight.is_floating_point() else weight.dtype) for name, weight in weights.items()
    }
    twin.load_state_dict(converted, assign=True)
    for module, original in zip(twin.modules(), plain.modules(), strict=True):  # hooks on the model see its twin run
        module._forward_pre_hooks.update(original._forward_pre_hooks)
        module._forward_hooks.update(original._forward_hooks)
    return twin.eval()
