"""Lookahead: runs candidates through the model in chunks and scores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import scoring
from .denoising import Denoised
from .masked_logits import Logits, concatenate, take_states
from .proposal import InfoGainProposal
from .reductions import CompileOptions, Reader, divergences, log_distributions, statistics

Before = tuple[torch.Tensor, torch.Tensor]
"""Log-distributions (M, V) and the row (B, L) of each position among them."""

CandidateIndex = tuple[torch.Tensor, torch.Tensor]
"""Sample and candidate, (K,) long each."""


@dataclass(frozen=True)
class Objective:
    """How candidates are compared.

    Attributes:
        mask_token_id: The scheduler's.
        reduction: Its `gain_reduction`.
        weight: Its `gain_weight`, w.
        weighs_cost: Whether the objective is J, not just the remaining uncertainty.
        compile_options: Of `torch.compile`, for the kernels that reduce logits; None for kernels that are not compiled.
    """

    mask_token_id: int
    reduction: str
    weight: float
    weighs_cost: bool = True
    compile_options: CompileOptions | None = None

    @property
    def compares_distributions(self) -> bool:
        """Whether the gain is a divergence from the previous logits, which the proposal then keeps."""
        return self.weighs_cost and self.reduction == "kl"

    def before(self, proposal: InfoGainProposal) -> Before | None:
        """What divergences compare with: log p (M, V) of z_t at its M masks, and the row (B, L) of each position.

        None if the gain is no divergence.
        """
        if proposal.logits is None:
            return None
        masked = proposal.masked
        row = torch.full(masked.shape, -1, device=masked.device)
        row[masked] = torch.arange(int(masked.sum()), device=masked.device)
        return log_distributions(Reader(proposal.logits, masked, self.mask_token_id)), row

    def evidence(
        self,
        logits: Logits,
        proposal: InfoGainProposal,
        candidates: CandidateIndex,
        step_index: int,
        before: Before | None,
    ) -> torch.Tensor:
        """Reduces the logits of some candidates to what their gains need, so that the logits can be freed.

        Args:
            logits: (K, L, V) of the candidates; only those at masked positions of distinct ones are read.
            candidates: Their indices.
            step_index: For error messages.
            before: What `before` returned for the proposal.

        Returns:
            (K, L) in nats: at positions still masked the entropy, or with "kl" KL(after ‖ before), and 0 elsewhere.

        Raises:
            ValueError: If a logit is NaN or +inf, or all of a position are -inf.
        """
        sample_index, candidate_index = candidates
        state, position = (proposal.next_masked & proposal.distinct[..., None])[candidates].nonzero(as_tuple=True)
        reader = Reader(logits, (state, position), self.mask_token_id)
        sample = sample_index[state]
        if before is None:
            found = statistics(reader, self.compile_options)
            value, top = found.entropy, found.top
        else:
            log_q, row = before
            value, top = divergences(reader, log_q, row[sample, position], self.compile_options)
        reader.check(top, step_index, (sample, candidate_index[state], position))
        values = torch.zeros(len(sample_index), proposal.masked.shape[-1], dtype=torch.float32, device=value.device)
        values[state, position] = value
        return values

    def __call__(self, evidence: torch.Tensor | None, proposal: InfoGainProposal) -> tuple[torch.Tensor, torch.Tensor]:
        """Information gain and objective of every candidate, (B, N) each; NaN if no lookahead was run.

        Args:
            evidence: (B, N, L) for every distinct candidate; None without a lookahead.
        """
        next_masked = proposal.next_masked
        if evidence is None:
            return self._without_lookahead(proposal, next_masked.any(-1))
        samples = torch.arange(len(evidence), device=evidence.device)
        values = evidence[samples[:, None], proposal.duplicate_of]
        if proposal.logits is not None:
            gain = scoring.surprise(proposal.cost, values, next_masked)
            return gain, scoring.objective(gain, proposal.cost, self.weight)
        next_uncertainty = scoring.state_uncertainty(values, next_masked, self.reduction)
        gain = scoring.information_gain(self.uncertainty(proposal), next_uncertainty)
        if not self.weighs_cost:
            return gain, -next_uncertainty
        return gain, scoring.objective(gain, proposal.cost, self.weight)

    def _without_lookahead(self, proposal: InfoGainProposal, unknown: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What candidates that leave nothing masked gain, since nothing is uncertain after them; of others nothing is known."""
        gain = self.uncertainty(proposal)[:, None] if proposal.logits is None else proposal.cost
        gain = gain.expand(unknown.shape).masked_fill(unknown, torch.nan)
        if not self.weighs_cost:
            return gain, torch.zeros_like(gain).masked_fill(unknown, torch.nan)
        return gain, scoring.objective(gain, proposal.cost, self.weight)

    def uncertainty(self, proposal: InfoGainProposal) -> torch.Tensor:
        """(B,) 𝓗(z_t) in nats."""
        return scoring.state_uncertainty(proposal.entropies, proposal.masked, self.reduction)


@dataclass(frozen=True)
class _Kept:
    """Candidates whose logits (K, L, V) are kept."""

    sample_index: torch.Tensor
    candidate_index: torch.Tensor
    logits: Logits

    def only(self, chosen: torch.Tensor) -> _Kept | None:
        """Only the candidates `chosen` (B, N); None if there are none."""
        here = chosen[self.sample_index, self.candidate_index].nonzero()[:, 0]
        if len(here) == len(self.sample_index):
            return self
        if not len(here):
            return None
        return _Kept(self.sample_index[here], self.candidate_index[here], take_states(self.logits, here))


class Lookahead:
    """The scores of all candidates of a proposal, and the logits of the best, in memory that does not grow with their number.

    Args:
        run: `run(candidates)` gives the logits (K, L, V) of candidates, and what they took.
        objective: How they are compared.
        wanted: `wanted(objective, known)`, both (B, N), says whose logits to keep, (B, N), given the objectives `known` so far;
            all others are dropped. A candidate wanted at the end must be wanted from the moment it is known. Of equal
            candidates the first one's logits are kept.
        chunk: How many candidates are run at once; by default all.
        step_index: For error messages.
        accepted_from: Run the candidates one after the other, and stop at the first one with this objective. None: run them all.

    Attributes:
        gain, objective: (B, N), as `Objective` gives them; NaN for candidates that were not looked at.
        winner: (B,) long, the first candidate with the largest objective.
        ran: (B, N) bool, the candidates that went through the model.
        num_evaluations: (B,) long, the rows of the network that they took.
        num_passes: (B,) long, in how many turns.
    """

    def __init__(
        self,
        run: Callable[[CandidateIndex], Denoised],
        objective: Objective,
        proposal: InfoGainProposal,
        wanted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        chunk: int | None = None,
        step_index: int = 0,
        accepted_from: float | None = None,
    ):
        next_masked = proposal.next_masked
        evidence = torch.zeros(next_masked.shape, dtype=torch.float32, device=next_masked.device)
        finished = proposal.finished
        # What is known of distinct candidates: theirs is what is known of the ones they stand for.
        known = torch.zeros_like(finished)
        self.ran = torch.zeros_like(finished)
        num_evaluations = torch.zeros_like(proposal.duplicate_of)
        self._duplicate_of = proposal.duplicate_of
        before = objective.before(proposal)
        kept: list[_Kept] = []
        columns = torch.arange(known.shape[1], device=known.device)
        undecided = torch.ones_like(finished[:, 0])
        self.gain, self.objective = objective(evidence, proposal)
        for turn in [columns] if accepted_from is None else columns.split(1):
            reached = undecided[:, None] & torch.isin(columns, turn)
            known |= reached & finished
            samples, candidate_index = (reached & proposal.distinct).nonzero(as_tuple=True)
            size = chunk or max(len(samples), 1)
            for start in range(0, len(samples), size):
                candidates = samples[start : start + size], candidate_index[start : start + size]
                logits, num_evaluations[candidates] = run(candidates)
                evidence[candidates] = objective.evidence(logits, proposal, candidates, step_index, before)
                known[candidates] = True
                self.ran[candidates] = True
                # On the whole tensors every time: how a sum rounds may depend on how many there are beside it.
                self.gain, self.objective = objective(evidence, proposal)
                chosen = wanted(self.objective, self._shared(known))
                first = torch.zeros(known.shape, dtype=torch.int, device=known.device)
                first = first.scatter_reduce(1, proposal.duplicate_of, chosen.int(), "amax").bool()
                kept = [left for part in (*kept, _Kept(*candidates, logits)) if (left := part.only(first)) is not None]
                del logits  # before the next ones are made
            if accepted_from is not None:
                undecided &= ~(reached & (self.objective >= accepted_from)).any(-1)
        unknown = ~self._shared(known)
        self.winner = self.objective.masked_fill(unknown, -torch.inf).argmax(1)
        self.gain = self.gain.masked_fill(unknown, torch.nan)
        self.objective = self.objective.masked_fill(unknown, torch.nan)
        self.num_evaluations = num_evaluations.sum(-1)
        self.num_passes = self.ran.any(-1).long() if accepted_from is None else self.ran.sum(-1)
        self._kept = kept

    def _shared(self, known: torch.Tensor) -> torch.Tensor:
        """(B, N) bool: what is known of the first ones of equal candidates, for all of them."""
        return known.gather(1, self._duplicate_of)

    def logits(self, samples: torch.Tensor, columns: torch.Tensor) -> Logits | None:
        """The logits (K, L, V) of candidates wanted at the end, 0 for those with nothing masked; None if all are like that."""
        if not self._kept:
            return None
        number = torch.full_like(self._duplicate_of, -1)
        sample_index = torch.cat([part.sample_index for part in self._kept])
        candidate_index = torch.cat([part.candidate_index for part in self._kept])
        number[sample_index, candidate_index] = torch.arange(len(sample_index), device=number.device)
        logits = concatenate([part.logits for part in self._kept])
        self._kept = []
        return take_states(logits, number[samples, self._duplicate_of[samples, columns]])
