"""Compiled pipelines: `torch.compile` for the model, and for what the scheduler reads from logits."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch

from .components import check_components, unwrapped
from .scheduling_infogain import InfoGainScheduler


class CompileMixin:
    """`compile` of the image and text pipelines.

    Attributes:
        compiled_component: The model that `compile` compiles.
    """

    compiled_component: ClassVar[str] = "transformer"
    _compile_options: dict[str, Any] | None = None

    def compile(self, **options: Any) -> None:
        """Compiles the model and the scheduler's decisions for all later calls.

        The first calls take much longer, until every number of states that occurs has been compiled: states are filled up to a
        power of two with copies, which are computed in vain. Results are equal up to rounding.

        The model is wrapped, not changed, so other pipelines that share it stay as they are; it is saved as before. A scheduler
        that is set later is compiled, too.

        Args:
            options: Of `torch.compile`, such as `mode="reduce-overhead"` for CUDA graphs; `dynamic` is True by default.

        Raises:
            ValueError: If the pipeline has no model.
        """
        check_components(self, self.compiled_component)
        self._compile_options = {"dynamic": True, **options}
        model = unwrapped(getattr(self, self.compiled_component))
        setattr(self, self.compiled_component, torch.compile(model, **self._compile_options))

    def scheduler_for_call(self, scheduler: InfoGainScheduler) -> InfoGainScheduler:
        """The scheduler as a call uses it: a compiled copy in a compiled pipeline."""
        if self._compile_options is None:
            return scheduler
        own = copy.copy(scheduler)
        own.compile(**self._compile_options)
        return own

    def fill_up(self, states: torch.Tensor, condition: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """States (K, ...) and their condition as a compiled model gets them: as many as a power of two, the last one repeated."""
        if self._compile_options is None:
            return states, condition
        size = 1 << (len(states) - 1).bit_length()
        index = torch.arange(size, device=states.device).clamp(max=len(states) - 1)
        return states[index], {name: value[index] for name, value in condition.items()}
