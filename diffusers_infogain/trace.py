"""The trace of a decoding: what every step did, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .proposal import InfoGainProposal, InfoGainSchedulerOutput

RECORDED = ("num_decoded", "cost", "log_probability", "winner", "num_compared", "num_states", "num_evaluations", "num_passes")
"""What is written beside every image, as lists over its steps."""


@dataclass
class DecodingTrace:
    """What happened, per step and sample: T steps, B samples, N candidates, L positions. Entropies in nats.

    Attributes:
        num_decoded: (T, B) long, tokens committed.
        cost: (T, B) float32, C of the committed action.
        gain: (T, B) float32, its information gain; NaN if no lookahead was run.
        objective: (T, B, N) float32, J of every candidate; NaN if no lookahead was run.
        winner: (T, B) long, the committed candidate; 0 is the greedy one.
        selected: (T, B, L) bool, the positions committed.
        log_probability: (T, B) float32, Σ log p_l(v_l) of the tokens committed, at temperature 1.
        num_compared: (T, B) long, distinct candidates that the lookahead scored; 0 without one.
        num_states: (T, B) long, states that went through the model for the sample: the current one, unless the lookahead before
            has its logits, and candidates.
        num_evaluations: (T, B) long, NFE, the rows of the network that this took: with guidance, a state takes two.
        num_passes: (T, B) long, forward passes one after the other, if all candidates that are run together fit on the device.
    """

    num_decoded: torch.Tensor
    cost: torch.Tensor
    gain: torch.Tensor
    objective: torch.Tensor
    winner: torch.Tensor
    selected: torch.Tensor
    log_probability: torch.Tensor
    num_compared: torch.Tensor
    num_states: torch.Tensor
    num_evaluations: torch.Tensor
    num_passes: torch.Tensor

    @property
    def cumulative_entropy(self) -> torch.Tensor:
        """H~ = Σ_t C(a_t | z_t) per sample (B,), over every commit, also of tokens that a corrector masked again later."""
        return self.cost.sum(0)

    @property
    def sequential_passes(self) -> torch.Tensor:
        """(B,) long, how many forward passes had to follow each other."""
        return self.num_passes.sum(0)

    @property
    def log_likelihood(self) -> torch.Tensor:
        """Σ_t Σ log p_l(v_l) per sample (B,), over every commit, in nats: how likely the model finds the sample in this order."""
        return self.log_probability.sum(0)

    @property
    def decoded_at(self) -> torch.Tensor:
        """(B, L) long: the (last) step in which a position was decoded, -1 where it was known."""
        number = torch.arange(len(self.selected))[:, None, None].expand(self.selected.shape)
        known = torch.full((1, *self.selected.shape[1:]), -1)
        return torch.cat([known, number.masked_fill(~self.selected, -1)]).amax(0)

    def records(self) -> list[dict[str, list[float] | list[int]]]:
        """Per sample, plain lists over the steps, for JSON: the fields of `RECORDED`."""
        columns = [getattr(self, name).T.tolist() for name in RECORDED]
        return [dict(zip(RECORDED, values, strict=True)) for values in zip(*columns, strict=True)]

    def __repr__(self) -> str:
        steps, batch = self.winner.shape
        per_sample = (("NFE", self.num_evaluations.sum(0)), ("nats of cumulative entropy", self.cumulative_entropy))
        figures = [f"{value.double().mean():.1f} {name}" for name, value in per_sample if batch]
        candidates = f", {self.objective.shape[-1]} candidates" if self.objective.shape[-1] > 1 else ""
        return f"DecodingTrace: {batch} samples in {steps} steps{candidates}; per sample {' and '.join(figures) or 'nothing'}"

    def take(self, sample_index: torch.Tensor) -> DecodingTrace:
        """The trace of some of the samples."""
        return DecodingTrace(**{name: value[:, sample_index] for name, value in vars(self).items()})

    def within(self, batch_size: int, sample_index: torch.Tensor) -> DecodingTrace:
        """The trace of a larger batch, of which these samples are `sample_index`; the others have no tokens, cost or NFE."""
        columns = {}
        for name, value in vars(self).items():
            fill = torch.nan if name in ("gain", "objective") else 0
            columns[name] = value.new_full((len(value), batch_size, *value.shape[2:]), fill)
            columns[name][:, sample_index] = value
        return DecodingTrace(**columns)

    @classmethod
    def join(cls, traces: Sequence[DecodingTrace]) -> DecodingTrace:
        """The steps of several traces of the same batch, one after the other."""
        return cls(**{name: torch.cat([vars(trace)[name] for trace in traces]) for name in cls.__dataclass_fields__})


class TraceRecorder:
    """Records a trace step by step, on the CPU."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def record(self, proposal: InfoGainProposal, output: InfoGainSchedulerOutput, counts: dict[str, torch.Tensor]) -> None:
        """Adds a step, with the fields of `DecodingTrace` that count what it took, (B,) each."""
        taken = torch.arange(len(output.winner), device=output.winner.device), output.winner
        self.add(
            num_decoded=proposal.num_decoded[taken],
            cost=proposal.cost[taken],
            gain=output.gain[taken],
            objective=output.objective,
            winner=output.winner,
            selected=proposal.selected[taken],
            log_probability=proposal.log_probability[taken],
            **counts,
        )

    def add(self, **values: torch.Tensor) -> None:
        """Adds a step by the fields of `DecodingTrace`, without their first dimension."""
        self.steps.append({name: value.cpu() for name, value in values.items()})

    def trace(self, shape: torch.Size, num_candidates: int) -> DecodingTrace:
        """The trace of all steps; `shape` (B, L) and N give its shapes if there were none."""
        batch, length = shape
        if not self.steps:
            integers = torch.zeros(0, batch, dtype=torch.long)
            numbers = torch.zeros(0, batch, dtype=torch.float32)
            return DecodingTrace(
                num_decoded=integers,
                cost=numbers,
                gain=numbers,
                objective=numbers[..., None].expand(-1, -1, num_candidates),
                winner=integers,
                selected=torch.zeros(0, batch, length, dtype=torch.bool),
                log_probability=numbers,
                num_compared=integers,
                num_states=integers,
                num_evaluations=integers,
                num_passes=integers,
            )
        return DecodingTrace(**{name: torch.stack([step[name] for step in self.steps]) for name in self.steps[0]})
