"""A pipeline's components where they are not plain: None, wrapped, offloaded, or in half precision."""

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
"""Pixels a token, along one side, of every image model that is published for these pipelines."""


_TOKENIZERS = threading.Lock()


def converted_scheduler(scheduler: Any) -> Any:
    """An `AmusedScheduler` as an `InfoGainScheduler`; anything else as it is."""
    # By name, since diffusers has deprecated aMUSEd and may drop the class.
    if not any(kind.__name__ == "AmusedScheduler" for kind in type(scheduler).__mro__):
        return scheduler
    # diffusers would take what was given by position for a default, and leave it out.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    return InfoGainScheduler.from_config(config)


def check_scheduler(scheduler: Any) -> InfoGainScheduler:
    """The scheduler.

    Raises:
        ValueError: If it is no `InfoGainScheduler`.
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


_MODELS = ("vqvae", "text_encoder", "transformer", "model")


def check_given(components: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the first model that is no module, or tokenizer that is none; None is allowed."""
    for name, value in components.items():
        if value is not None and name in _MODELS:
            check_type(name, value, torch.nn.Module, "a model (torch.nn.Module) or None")
        elif value is not None and name == "scheduler":
            check_type(name, value, SchedulerMixin, "a scheduler or None")
        elif value is not None and name == "tokenizer":
            check_type(name, value, PreTrainedTokenizerBase, "a tokenizer of transformers or None")


def tokenize(tokenizer: Any, text: Any, **options: Any) -> Any:
    """Calls a tokenizer, one thread at a time.

    Fast tokenizers store their padding and truncation between calls, so concurrent calls would get each other's.
    """
    with _TOKENIZERS:
        return tokenizer(text, **options)


def unwrapped(model: Any) -> Any:
    """The model itself where `torch.compile` has wrapped it."""
    return model._orig_mod if is_compiled_module(model) else model


def scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels a token, along one side, of an image tokenizer with this configuration."""
    levels = config.get("block_out_channels") or config["encoder_multipliers"]
    return 2 ** (len(levels) - 1)


def keep_scale_factor(
    pipe: Any, repository: str | os.PathLike[str], arguments: Mapping[str, Any], hub: Mapping[str, Any]
) -> None:
    """Where a saved pipeline was loaded without its image tokenizer: reads from its configuration what a token is in pixels."""
    if "vqvae" in arguments and arguments["vqvae"] is None:
        try:
            config = VQModel.load_config(repository, subfolder="vqvae", **hub)
        except OSError:  # saved without one
            return
        pipe.vae_scale_factor = scale_factor(config)


def in_float32(model: Any, needed: bool = True) -> Any:
    """The model in float32, for decoders that overflow or blur in half precision.

    The model itself where it is in float32, or `needed` is False, else another one with its weights, for this call: the model
    is shared, between threads and between pipelines, and is not touched. Weights that are quantised stay as they are.
    """
    plain = unwrapped(model)
    parameters = list(plain.parameters())
    floating = all(parameter.is_floating_point() for parameter in parameters)
    if not needed or not floating or all(parameter.dtype == torch.float32 for parameter in parameters):
        return model
    hook = getattr(plain, "_hf_hook", None)
    if hook is not None:  # offloaded: what ran before it makes room
        hook.pre_forward(plain)
    offloaded = any(parameter.is_meta for parameter in parameters)
    weights = get_state_dict_offloaded_model(plain) if offloaded else plain.state_dict()
    device = next((one.device for one in plain.parameters() if not one.is_meta), torch.device("cpu"))
    device = getattr(hook, "execution_device", None) or device
    with torch.device("meta"):
        twin = type(plain).from_config(plain.config)
    converted = {
        name: weight.to(device, torch.float32 if weight.is_floating_point() else weight.dtype) for name, weight in weights.items()
    }
    twin.load_state_dict(converted, assign=True)
    for module, same in zip(twin.modules(), plain.modules(), strict=True):  # who watches the model sees its twin
        module._forward_pre_hooks.update(same._forward_pre_hooks)
        module._forward_hooks.update(same._forward_hooks)
    return twin.eval()
