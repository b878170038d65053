"""The candidate actions of a step, and the action that was committed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from .masked_logits import Logits
from .printing import summary
from .step import Memory


@dataclass
class InfoGainProposal(BaseOutput):
    """N candidate actions per sample, as the states they lead to. L = H · W for images.

    Attributes:
        candidates: (B, N, L) long, z_{t-1} for every action.
        selected: (B, N, L) bool, A: the positions that the action decodes.
        cost: (B, N) float32, C(a | z_t) in nats.
        log_probability: (B, N) float32, Σ_{l in A} log p_l(v_l) of the action's tokens in nats, at temperature 1.
        needs_lookahead: Whether `select` needs logits of the candidates: not when all candidates of every sample coincide, not
            when they decode the last masks, and never for a greedy sampler.
        masked: (B, L) bool, M_t: masked positions that may be decoded.
        remasked: (B, L) bool, decoded positions that the corrector masks again, in all candidates.
        compared: (B,) bool, samples for which a lookahead compares the candidates; of others it takes the first one.
        entropies: (B, L) float32, H_l(z_t) in nats on M_t, 0 elsewhere.
        duplicate_of: (B, N) long, the first candidate with the same state; only that one's logits are read.
        logits: (B, L, V) of z_t, where the gain compares distributions ("kl"), else None.
        memory: For the next step's `propose`.
        variance: (B, N) float32, the variance that `log_probability` has if tokens are drawn at temperature 1, in nats²; None
            unless the scheduler retries unlikely samples.
    """

    candidates: torch.Tensor
    selected: torch.Tensor
    cost: torch.Tensor
    log_probability: torch.Tensor
    needs_lookahead: bool
    masked: torch.Tensor
    remasked: torch.Tensor
    compared: torch.Tensor
    entropies: torch.Tensor
    duplicate_of: torch.Tensor
    logits: Logits | None = None
    memory: Memory | None = None
    variance: torch.Tensor | None = None

    def __repr__(self) -> str:
        return summary(self)

    @property
    def num_decoded(self) -> torch.Tensor:
        """(B, N) long, k_t of every action."""
        return self.selected.sum(-1)

    @property
    def next_masked(self) -> torch.Tensor:
        """(B, N, L) bool, M_{t-1} for every action, but for what is masked again."""
        return self.masked[:, None] & ~self.selected

    @property
    def finished(self) -> torch.Tensor:
        """(B, N) bool: the candidates that leave nothing masked."""
        return ~(self.next_masked.any(-1) | self.remasked.any(-1, keepdim=True))

    @property
    def distinct(self) -> torch.Tensor:
        """(B, N) bool: the candidates whose logits `select` reads, one of every group of equal ones with masks left."""
        first = self.duplicate_of == torch.arange(self.duplicate_of.shape[1], device=self.duplicate_of.device)
        return first & ~self.finished & self.compared[:, None]

    def commit(
        self, winner: torch.Tensor, gain: torch.Tensor, objective: torch.Tensor, pred_logits: Logits | None = None
    ) -> InfoGainSchedulerOutput:
        """Commits the candidates `winner` (B,)."""
        return InfoGainSchedulerOutput(
            prev_sample=self.candidates[torch.arange(len(winner), device=winner.device), winner],
            pred_logits=pred_logits,
            cost=self.cost,
            gain=gain,
            objective=objective,
            winner=winner,
        )


@dataclass
class InfoGainSchedulerOutput(BaseOutput):
    """What a step commits.

    Attributes:
        prev_sample: (B, L) long (`step`: the shape of `sample`), z_{t-1}.
        pred_logits: (B, L, V), the lookahead logits of `prev_sample`, for the next step; None without a lookahead.
        cost: (B, N) float32, C(a | z_t) in nats.
        gain: (B, N) float32, IG(a; z_t) in nats; NaN if no lookahead was run.
        objective: (B, N) float32, what `winner` maximises; NaN like `gain`.
        winner: (B,) long, the index of the committed candidate.
    """

    prev_sample: torch.Tensor
    pred_logits: Logits | None
    cost: torch.Tensor
    gain: torch.Tensor
    objective: torch.Tensor
    winner: torch.Tensor

    def __repr__(self) -> str:
        return summary(self)
