"""Callbacks after each step of a pipeline, and the state of a running call that they read and change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .checks import check_type
from .decoding import DecodingStep
from .masked_logits import MaskedLogits
from .printing import shown

StepCallback: TypeAlias = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None


@dataclass
class CallState:
    """State of a running call of a pipeline, which its callbacks and other threads can read and change.

    Attributes:
        guidance_scale: As given to the call; a change takes effect in the next step.
        further_scales: The guidance scales of further negative conditions, by the argument of the call.
        unguided: Largest guidance scale that switches guidance off.
        num_timesteps: The most steps there may be; after the call, the number that it took (an entropy bound can end it early).
        interrupt: Set it to True to end the decoding before the next step.
        conditions: Tensors that the model is conditioned on, by name; callbacks can replace them.
    """

    guidance_scale: float = 1.0
    unguided: float = 1.0
    further_scales: dict[str, float] = field(default_factory=dict)
    num_timesteps: int = 0
    interrupt: bool = False
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the model also runs without its condition, or without a part of it."""
        return max(self.guidance_scale, *self.further_scales.values(), self.unguided) > self.unguided

    def fingerprint(self) -> tuple[Any, ...]:
        """Differs after a change that affects the model's output."""
        return self.guidance_scale, *self.further_scales.values(), *map(id, self.conditions.values())


class CallStateMixin:
    """The properties through which users and callbacks of diffusers control a running pipeline.

    Calls in several threads do not see each other: a thread reads and changes the state of its own call. In a thread without a
    running call the properties are those of the call that started last, and setting `_interrupt` ends all running calls.
    """

    @contextmanager
    def running(self, state: CallState) -> Iterator[None]:
        """Makes `state` the state of this thread's call within the block."""
        thread, calls = threading.get_ident(), self.__dict__.setdefault("_running_calls", {})
        outer = calls.get(thread)
        calls[thread] = self.__dict__["_last_call"] = state
        try:
            yield
        finally:
            if outer is None:
                del calls[thread]
            else:
                calls[thread] = outer
            state.conditions = {}  # the pipeline keeps the state of the last call, but not its tensors

    def _own_call(self) -> CallState | None:
        return self.__dict__.get("_running_calls", {}).get(threading.get_ident())

    def _call(self, name: str) -> CallState:
        state = self._own_call() or self.__dict__.get("_last_call")
        if state is None:
            raise AttributeError(f"{type(self).__name__} has no `{name}` before its first call.")
        return state

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call, or of the last one."""
        return self._call("guidance_scale").guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._call("guidance_scale").guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call, or the last one, is guided."""
        return self._call("do_classifier_free_guidance").do_classifier_free_guidance

    @property
    def num_timesteps(self) -> int:
        """Planned number of steps of the running call, or the number that the last one took."""
        return self._call("num_timesteps").num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call, or the last one, was interrupted, which setting `_interrupt` to True does."""
        state = self._own_call() or self.__dict__.get("_last_call")
        return state is not None and state.interrupt

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        own = self._own_call()
        for state in [own] if own is not None else list(self.__dict__.get("_running_calls", {}).values()):
            state.interrupt = value


def tensor_inputs(callback: StepCallback, names: Sequence[str], allowed: Sequence[str]) -> Sequence[str]:
    """Names of the tensors that a callback receives: those a callback object of diffusers lists itself, otherwise `names`.

    Raises:
        ValueError: For a callback that cannot be called, or an unknown name.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    elif callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` must be a function, a PipelineCallback or None, got {shown(callback)}.")
    check_type("callback_on_step_end_tensor_inputs", names, (list, tuple), "a list of names")
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {', '.join(allowed)}, got {shown(unknown)}.")
    return names


def call_back(
    pipe: Any,
    callback: Callable[..., Any],
    step: DecodingStep,
    names: Sequence[str],
    tokens_name: str,
    state: CallState,
    **tensors: torch.Tensor,
) -> torch.Tensor | None:
    """Calls a pipeline's `callback_on_step_end`; returns the tokens that it returns, if any.

    Conditions that it returns replace those of `state`; the model then runs again, as after a change of the guidance scale.

    Args:
        pipe: The pipeline, the first argument of the callback.
        callback: The callback.
        step: The step that ended; its `recompute` is set if the model must run again.
        names: The tensors that it receives: "logits", "scores", some of `tensors` or of the conditions.
        tokens_name: The one of `tensors` that holds the tokens, in the pipeline's shape.
        state: The state of the call.
        tensors: What the pipeline offers besides logits, scores and conditions.

    Raises:
        ValueError: If it does not return a dictionary or None, or returns a condition of another shape.
    """
    available: dict[str, Any] = {**state.conditions, **tensors, "logits": step.logits, "scores": step.scores}
    callback_kwargs = {name: available[name] for name in names}
    if isinstance(callback_kwargs.get("logits"), MaskedLogits):
        callback_kwargs["logits"] = callback_kwargs["logits"].dense()
    before = state.fingerprint()
    returned = callback(pipe, step.index, step.timestep, callback_kwargs)
    returned = {} if returned is None else returned
    check_type("callback_on_step_end", returned, dict, "a function that returns a dictionary or None")
    for name in state.conditions.keys() & returned.keys():
        old, new = state.conditions[name], returned[name]
        if old is not new:
            if getattr(new, "shape", None) != getattr(old, "shape", None):
                raise ValueError(f"`callback_on_step_end` must return `{name}` in its shape, got {shown(new)} for {shown(old)}.")
            state.conditions[name] = new
    step.recompute = state.fingerprint() != before
    return returned.get(tokens_name)
