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
    """What a running call of a pipeline lets its callbacks, and other threads, read and change.

    Attributes:
        guidance_scale: As given to the call; a change counts from the next step.
        unguided: The guidance scale up to which there is none.
        num_timesteps: Steps planned; after the call, those it took (an entropy bound ends early).
        interrupt: Set it to end the decoding before the next step.
        conditions: Tensors that the model is conditioned on, by name, which a callback may replace.
    """

    guidance_scale: float = 1.0
    unguided: float = 1.0
    num_timesteps: int = 0
    interrupt: bool = False
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the model also runs without its condition."""
        return self.guidance_scale > self.unguided

    def fingerprint(self) -> tuple[Any, ...]:
        """What the model's output depends on; it differs after a change."""
        return self.guidance_scale, *map(id, self.conditions.values())


class CallStateMixin:
    """Properties by which diffusers' users and callbacks steer a pipeline while it runs.

    Calls in several threads do not see each other: a thread reads and changes its own call's state. Read from a thread in which
    no call runs, the properties are those of the call that began last; `_interrupt` set there ends all running calls.
    """

    @contextmanager
    def running(self, state: CallState) -> Iterator[None]:
        """Makes `state` that of this thread's call within the block."""
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
            state.conditions = {}  # the last call's state stays with the pipeline, its tensors do not

    def _own_call(self) -> CallState | None:
        return self.__dict__.get("_running_calls", {}).get(threading.get_ident())

    def _call(self, name: str) -> CallState:
        state = self._own_call() or self.__dict__.get("_last_call")
        if state is None:
            raise AttributeError(f"{type(self).__name__} has no `{name}` before its first call.")
        return state

    @property
    def guidance_scale(self) -> float:
        """The running call's, or the last one's."""
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
        """Steps of the running call as planned, or of the last one as taken."""
        return self._call("num_timesteps").num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the running call, or the last one, was told to end: set `_interrupt` to True to do so."""
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
    """What a callback is given: what diffusers' callback objects ask for themselves, else `names`.

    Raises:
        ValueError: If there is no such thing.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    elif callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` must be a function, a PipelineCallback or None, got {shown(callback)}.")
    check_type("callback_on_step_end_tensor_inputs", names, (list, tuple), "a list of names")
    unknown = [name if isinstance(name, str) else shown(name) for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {', '.join(allowed)}, got {', '.join(unknown)}.")
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
    """Calls a pipeline's `callback_on_step_end`; returns the tokens that it gives back, if any.

    Conditions that it gives back replace those of `state`; the model then runs anew, as after a change of the guidance scale.

    Args:
        names: What it asks for: "logits", "scores", one of `tensors` or of the conditions.
        tokens_name: The one of `tensors` that are the tokens, in the pipeline's shape.

    Raises:
        ValueError: If it returns no dictionary, or a condition of another shape.
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
