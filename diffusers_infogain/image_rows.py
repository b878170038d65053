"""The rows of the network behind the decisions of an image pipeline: conditional and negative ones, and guidance between them."""

from __future__ import annotations

from typing import Any

import torch

from .denoising import Denoised
from .guidance import Negative, guide_states
from .image_call import Condition, ImageCall
from .masked_logits import Logits, MaskedLogits, split_states, take_states


class ExactRows:
    """`denoise` and `guide` of a call whose rows are all run as a whole. It belongs to the call, and to one thread.

    Args:
        pipe: The pipeline.
        call: The call.
    """

    def __init__(self, pipe: Any, call: ImageCall):
        self._pipe = pipe
        self._call = call

    def advance(self, tokens: torch.Tensor) -> None:
        """After a step that led to the states `tokens` (B, L): nothing is kept."""

    def denoise(self, states: torch.Tensor, sample_index: torch.Tensor) -> Denoised:
        """Logits of states (R, L) of the images `sample_index` (R,), guided where the call is.

        Equal states with equal conditions are one row of the network, and states whose guidance is off have no negative row.
        """
        rows = self._call.rows(states, sample_index)
        condition = self._call.condition(sample_index[rows.state])
        negatives = self._call.negatives(states, sample_index) if self._call.guided_lookahead else []
        if negatives and self._pipe.batches_guidance:
            steered = [self._negative(negative, sample_index) for negative in negatives]
            every = [states[rows.state] for rows in (*(negative.rows for negative in negatives), rows)]
            joined = {name: torch.cat([*(one[name] for one in steered), value]) for name, value in condition.items()}
            logits, unconds = self._predict(torch.cat(every), joined), []
            for negative in negatives:
                uncond, logits = split_states(logits, len(negative.rows.state))
                unconds.append(uncond)
            return self._guided(take_states(logits, rows.number), unconds, negatives, rows.count)
        cond = self._predict(states[rows.state], condition)
        unconds = [self._uncond(negative, states, sample_index) for negative in negatives]
        return self._guided(take_states(cond, rows.number), unconds, negatives, rows.count)

    def guide(self, logits: Logits, states: torch.Tensor, sample_index: torch.Tensor) -> Denoised:
        """Guided logits of states (R, L), given those with their conditions alone (R, L, V)."""
        negatives = self._call.negatives(states, sample_index)
        unconds = [self._uncond(negative, states, sample_index) for negative in negatives]
        return self._guided(logits, unconds, negatives, torch.zeros_like(sample_index))

    def _negative(self, negative: Negative, sample_index: torch.Tensor) -> Condition:
        return self._call.negative(sample_index[negative.rows.state], negative.scale)

    def _uncond(self, negative: Negative, states: torch.Tensor, sample_index: torch.Tensor) -> Logits:
        return self._predict(states[negative.rows.state], self._negative(negative, sample_index))

    def _guided(self, cond: Logits, unconds: list[Logits], negatives: list[Negative], num_evaluations: torch.Tensor) -> Denoised:
        parts = [(uncond, negative.weights, negative.rows) for uncond, negative in zip(unconds, negatives, strict=True)]
        return Denoised(guide_states(cond, parts), sum((rows.count for _, _, rows in parts), num_evaluations))

    def _predict(self, states: torch.Tensor, condition: Condition) -> Logits:
        """`predict` for states (K, L), with one entry of the condition each."""
        filled, condition = self._pipe.fill_up(states, condition)
        logits = self._pipe.predict(filled.unflatten(1, self._call.grid), call=self._call, **condition)
        if logits.ndim == 3:
            return logits[: len(states)]
        wanted = self._call.wanted(states)
        return MaskedLogits.at(wanted, logits if filled is states else logits[: int(wanted.sum())])
