"""The trace of a decoding: what every step did, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .proposal import InfoGainProposal, InfoGainSchedulerOutput


def count_sequential_passes(num_evaluations: torch.Tensor, looks_ahead: bool, starts: torch.Tensor | None = None) -> torch.Tensor:
    """Sequential forward passes of each sample, (B,), from its evaluations per step (T, B).

    This is what decoding costs if candidates and runs fit on the device side by side: one pass per step, and two in a step that
    begins a canvas (`starts` (T, B); by default the first) with a lookahead, one for the canvas and one for the candidates if
    they differ. (The step after one in which all candidates of a batch coincided needs an extra pass, which the evaluations do
    not show and which is not counted.)
    """
    calls = (num_evaluations > 0).sum(0)
    if not looks_ahead:
        return calls
    return calls + (num_evaluations[:1] > 1 if starts is None else starts & (num_evaluations > 1)).sum(0)


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
        num_evaluations: (T, B) long, NFE: states that went through `denoise` for the sample. Guidance doubles the work of each.
        starts: (T, B) bool, steps that begin a canvas: several where blocks of a text were decoded one after the other.
    """

    num_decoded: torch.Tensor
    cost: torch.Tensor
    gain: torch.Tensor
    objective: torch.Tensor
    winner: torch.Tensor
    selected: torch.Tensor
    num_evaluations: torch.Tensor
    starts: torch.Tensor

    @property
    def cumulative_entropy(self) -> torch.Tensor:
        """H~ = Σ_t C(a_t | z_t) per sample (B,), over every commit."""
        return self.cost.sum(0)

    @property
    def sequential_passes(self) -> torch.Tensor:
        """(B,) long, how many forward passes had to follow each other (`count_sequential_passes`)."""
        return count_sequential_passes(self.num_evaluations, looks_ahead=self.objective.shape[-1] > 1, starts=self.starts)

    @property
    def decoded_at(self) -> torch.Tensor:
        """(B, L) long: the (last) step in which a position was decoded, -1 where it was known."""
        number = torch.arange(len(self.selected))[:, None, None].expand(self.selected.shape)
        known = torch.full((1, *self.selected.shape[1:]), -1)
        return torch.cat([known, number.masked_fill(~self.selected, -1)]).amax(0)

    def records(self) -> list[dict[str, list[float] | list[int]]]:
        """Per sample, plain lists over the steps, for JSON: "num_decoded", "cost", "winner", "num_evaluations"."""
        names = ("num_decoded", "cost", "winner", "num_evaluations")
        columns = [getattr(self, name).T.tolist() for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

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

    def record(self, proposal: InfoGainProposal, output: InfoGainSchedulerOutput, num_evaluations: torch.Tensor) -> None:
        """Adds a step, with the NFE (B,) that it took."""
        taken = torch.arange(len(output.winner), device=output.winner.device), output.winner
        self.add(
            num_decoded=proposal.num_decoded[taken],
            cost=proposal.cost[taken],
            gain=output.gain[taken],
            objective=output.objective,
            winner=output.winner,
            selected=proposal.selected[taken],
            num_evaluations=num_evaluations,
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
                num_evaluations=integers,
                starts=integers.bool(),
            )
        starts = torch.arange(len(self.steps))[:, None].expand(-1, batch) == 0
        columns = {name: torch.stack([step[name] for step in self.steps]) for name in self.steps[0]}
        return DecodingTrace(**columns, starts=starts)
