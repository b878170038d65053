"""Candidates run through the model and scored part by part, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .masked_logits import Logits, MaskedLogits, concatenate, take_states
from .scheduling_infogain import InfoGainProposal, InfoGainScheduler

Rows = tuple[torch.Tensor, torch.Tensor]
"""Samples and candidates, (K,) long each."""


class Lookahead:
    """The scores of all candidates of a proposal, and the logits of the best.

    Args:
        run: `run(rows)` gives the logits (K, L, V) of candidates.
        wanted: `wanted(objective, known)`, both (B, N), tells which candidates' logits are wanted (B, N) when the objectives of
            the `known` ones are all there is; the logits of all others are dropped. A candidate that is wanted in the end must be
            wanted from when it is known. Of equal candidates the first one's logits are kept.
        chunk: How many candidates are run at once; by default all.

    Attributes:
        gain, objective: (B, N), as `InfoGainScheduler.score` tells them.
    """

    def __init__(
        self,
        run: Callable[[Rows], Logits],
        scheduler: InfoGainScheduler,
        timestep: int | torch.Tensor,
        proposal: InfoGainProposal,
        wanted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        chunk: int | None = None,
    ):
        next_masked, self.duplicate_of = proposal.next_masked, proposal.duplicate_of
        samples, columns = proposal.distinct.nonzero(as_tuple=True)
        values = torch.zeros(next_masked.shape, dtype=torch.float32, device=next_masked.device)
        known = ~next_masked.any(-1)
        self._kept: list[tuple[torch.Tensor, torch.Tensor, Logits]] = []
        size = chunk or max(len(samples), 1)
        for rows in zip(samples.split(size), columns.split(size), strict=True):
            logits = run(rows)
            values[rows] = scheduler.score_rows(logits, timestep, proposal, rows)
            known[rows] = True
            # On the whole tensors every time: how a sum rounds may depend on how many there are beside it.
            self.gain, self.objective = scheduler.score(values, proposal)
            chosen = wanted(self.objective, known.gather(1, self.duplicate_of))
            first = torch.zeros(known.shape, dtype=torch.int, device=known.device)
            first = first.scatter_reduce(1, self.duplicate_of, chosen.int(), "amax").bool()
            self._kept = [part for one in (*self._kept, (*rows, logits)) if (part := _those(one, first)) is not None]
            del logits  # before the next ones are made

    def logits(self, samples: torch.Tensor, columns: torch.Tensor) -> Logits | None:
        """The logits (K, L, V) of candidates wanted in the end, 0 for those with nothing masked; None if all are such."""
        if not self._kept:
            return None
        number = torch.full_like(self.duplicate_of, -1)
        rows = [torch.cat(part) for part in zip(*(one[:2] for one in self._kept), strict=True)]
        number[rows[0], rows[1]] = torch.arange(len(rows[0]), device=number.device)
        every = concatenate([one[2] for one in self._kept])
        self._kept = []
        return take_states(every, number[samples, self.duplicate_of[samples, columns]])


def _those(
    part: tuple[torch.Tensor, torch.Tensor, Logits], chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Logits] | None:
    """What is left of a part with the candidates `chosen` (B, N) alone."""
    samples, columns, logits = part
    here = chosen[samples, columns].nonzero()[:, 0]
    if len(here) == len(samples):
        return part
    if not len(here):
        return None
    logits = logits[here]
    return samples[here], columns[here], logits.compact() if isinstance(logits, MaskedLogits) else logits
