"""Models as the loops use them: what they say of states, in chunks, and what that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .masked_logits import Logits, MaskedLogits, concatenate, replace_states, take_states


class Denoised(NamedTuple):
    """What a model says of R states, and what that took.

    Attributes:
        logits: (R, L, V), or those at the masks only.
        num_evaluations: (R,) long, the rows of the network that each state took: 2 with guidance, 0 if another's serve.
    """

    logits: Logits
    num_evaluations: torch.Tensor


Denoise = Callable[[torch.Tensor, torch.Tensor], Logits | Denoised]
"""`denoise(tokens, sample_index)`: see `decode`."""

Guide = Callable[[Logits, torch.Tensor, torch.Tensor], Denoised]
"""`guide(logits, tokens, sample_index)`: see `decode`."""


@dataclass(frozen=True)
class Model:
    """A model as the loops use it: states in, logits out, in chunks.

    Attributes:
        denoise, guide: As in `decode`.
        mask_token_id: Marks the positions that have logits.
        chunk: How many states go through `denoise` at once; None for all.
    """

    denoise: Denoise
    guide: Guide | None
    mask_token_id: int
    chunk: int | None

    def run(self, states: torch.Tensor, sample_index: torch.Tensor) -> Denoised:
        """Logits (R, L, V) of states (R, L) of the samples `sample_index` (R,), in one call."""
        output = self.denoise(states, sample_index)
        logits, num_evaluations = output if isinstance(output, Denoised) else (output, torch.ones_like(sample_index))
        if isinstance(logits, torch.Tensor) and logits.ndim == 2:
            logits = MaskedLogits.at(states == self.mask_token_id, logits)
        return Denoised(logits, num_evaluations)

    def logits(
        self, states: torch.Tensor, sample_index: torch.Tensor, where: torch.Tensor, known: Logits | None = None
    ) -> Denoised:
        """Logits (R, L, V) of the states where `where` (R,) is true; of others those `known`, or finite ones, never read."""
        return self._in_chunks(self.run, where, states, sample_index, known=known)

    def guided(self, logits: Logits, states: torch.Tensor, sample_index: torch.Tensor, where: torch.Tensor) -> Denoised:
        """The logits by which such states are decoded, from those of `logits`."""
        guide = self.guide
        if guide is None:
            return Denoised(logits, torch.zeros_like(sample_index))
        rows = torch.arange(len(states), device=states.device)
        return self._in_chunks(lambda chosen, *part: guide(take_states(logits, chosen), *part), where, rows, states, sample_index)

    def _in_chunks(
        self, function: Callable[..., Denoised], where: torch.Tensor, *tensors: torch.Tensor, known: Logits | None = None
    ) -> Denoised:
        if self.chunk is None and where.all():
            return function(*tensors)
        chosen = [tensor[where] for tensor in tensors]
        size = self.chunk or len(chosen[0])
        parts = [function(*part) for part in zip(*(tensor.split(size) for tensor in chosen), strict=True)]
        num_evaluations = where.long()
        num_evaluations[where] = torch.cat([part.num_evaluations for part in parts])
        logits = concatenate([part.logits for part in parts])
        if known is not None:
            return Denoised(replace_states(known, where.nonzero()[:, 0], logits), num_evaluations)
        return Denoised(take_states(logits, torch.where(where, where.cumsum(0) - 1, -1)), num_evaluations)
