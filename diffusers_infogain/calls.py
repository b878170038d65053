"""What the calls of all pipelines share: prompts, searches, callbacks after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .decoding import DecodingStep
from .masked_logits import MaskedLogits
from .scheduling_infogain import at_least

StepCallback: TypeAlias = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None


def prompt_list(name: str, prompt: Any) -> list[str]:
    """A string or a list of strings that is not empty, as a list.

    Raises:
        ValueError: If it is anything else.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not (isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts)):
        raise ValueError(f"`{name}` must be a string or a list of strings that is not empty, got {prompt!r}.")
    return texts


def check_search(num_beams: int, num_runs: int, callback: object) -> None:
    """Raises a ValueError for numbers below 1, both above 1, or a callback beside a search, which could not follow it."""
    for name, value in (("num_beams", num_beams), ("num_runs", num_runs)):
        at_least(name, value, 1, int)
    if num_beams > 1 and num_runs > 1:
        raise ValueError(f"`num_beams` and `num_runs` must not both be above 1, got {num_beams} and {num_runs}.")
    if callback is not None and (num_beams > 1 or num_runs > 1):
        raise ValueError("`callback_on_step_end` must be None with `num_beams` or `num_runs` above 1.")


def tensor_inputs(callback: StepCallback, names: Sequence[str], allowed: Sequence[str]) -> Sequence[str]:
    """What a callback is given: what diffusers' callback objects ask for themselves, else `names`.

    Raises:
        ValueError: If there is no such thing.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {', '.join(allowed)}, got {', '.join(unknown)}.")
    return names


def call_back(
    pipe: Any, callback: Callable[..., Any], step: DecodingStep, names: Sequence[str], tokens_name: str, **tensors: torch.Tensor
) -> torch.Tensor | None:
    """Calls a pipeline's `callback_on_step_end`; returns the tokens that it gives back, if any.

    Args:
        names: What it asks for: "logits", "scores" or one of `tensors`.
        tokens_name: The one of `tensors` that are the tokens, in the pipeline's shape.
    """
    available: dict[str, Any] = {**tensors, "logits": step.logits, "scores": step.scores}
    callback_kwargs = {name: available[name] for name in names}
    if isinstance(callback_kwargs.get("logits"), MaskedLogits):
        callback_kwargs["logits"] = callback_kwargs["logits"].dense()
    return (callback(pipe, step.index, step.timestep, callback_kwargs) or {}).get(tokens_name)
