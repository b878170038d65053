"""The decoding loop: denoise, propose, look ahead, select (Algorithm 1 of arXiv 2602.18176), and the trace of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .candidates import Generators, split_generator
from .checks import check_integer, check_tensor, check_type
from .lookahead import CandidateIndex, Lookahead
from .masked_logits import Logits, MaskedLogits, concatenate, take_states
from .printing import shown, summary
from .proposal import InfoGainProposal, InfoGainSchedulerOutput
from .rules import Memory
from .scheduling_infogain import InfoGainScheduler

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`denoise(tokens, sample_index)`: see `decode`."""


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


@dataclass
class DecodingOutput:
    """Tokens (B, L), how they came about, and the seed of every sample (B), from which it comes out again alone."""

    tokens: torch.Tensor
    trace: DecodingTrace
    seeds: list[int]

    def __repr__(self) -> str:
        return summary(self)


@dataclass
class DecodingStep:
    """What a callback sees after a step.

    Attributes:
        index: Number of the step, from 0.
        timestep: The scheduler's.
        tokens: (B, L) long, the new state.
        logits: (B, L, V), those that the step decided on.
        scores: (B, N) float32, J of every candidate; NaN if no lookahead was run.
        recompute: To be set to True by a callback if `denoise` says something else from now on: logits are then computed anew.
    """

    index: int
    timestep: torch.Tensor
    tokens: torch.Tensor
    logits: Logits
    scores: torch.Tensor
    recompute: bool = False


Callback = Callable[[DecodingStep], torch.Tensor | None]
Interrupted = Callable[[], bool]


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


@dataclass(frozen=True)
class Model:
    """A model as the loops use it: states in, logits out, in chunks.

    Attributes:
        denoise: As in `decode`.
        mask_token_id: Marks the positions that have logits.
        chunk: How many states go through `denoise` at once; None for all.
    """

    denoise: Denoise
    mask_token_id: int
    chunk: int | None

    def run(self, states: torch.Tensor, sample_index: torch.Tensor) -> Logits:
        """Logits (R, L, V) of states (R, L) of the samples `sample_index` (R,), in one call."""
        logits = self.denoise(states, sample_index)
        return logits if logits.ndim == 3 else MaskedLogits.at(states == self.mask_token_id, logits)

    def logits(self, states: torch.Tensor, sample_index: torch.Tensor, where: torch.Tensor) -> Logits:
        """Logits (R, L, V) of the states where `where` (R,) is true. Those of other states are finite, and never read."""
        chosen = states[where]
        size = self.chunk or len(chosen)
        parts = zip(chosen.split(size), sample_index[where].split(size), strict=True)
        logits = concatenate([self.run(*part) for part in parts])
        return take_states(logits, torch.where(where, where.cumsum(0) - 1, -1))


@dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same while samples are decoded, in any of the loops: the checked arguments of `decode`."""

    scheduler: InfoGainScheduler
    model: Model
    seeds: list[int]
    generators: list[torch.Generator]
    allowed: torch.Tensor | None
    initial_masks: torch.Tensor
    grid: tuple[int, int] | None
    interrupted: Interrupted

    @classmethod
    def begin(
        cls,
        denoise: Denoise,
        scheduler: InfoGainScheduler,
        tokens: torch.Tensor,
        allowed: torch.Tensor | None,
        generator: Generators,
        lookahead_batch_size: int | None,
        grid: tuple[int, int] | None,
        num_inference_steps: int | None,
        interrupted: Interrupted | None,
        callback: Callback | None = None,
    ) -> Run:
        """Checks the arguments and draws the samples' seeds.

        Raises:
            ValueError: For the first argument that does not fit.
        """
        check_tensor("tokens", tokens, [2], "a long tensor (batch, length)", [torch.long])
        check_type("scheduler", scheduler, InfoGainScheduler, "an InfoGainScheduler")
        undecided = scheduler.undecided(tokens, allowed)
        if not callable(denoise):
            raise ValueError(f"`denoise` must be a function, got {shown(denoise)}.")
        for name, function in (("interrupted", interrupted), ("callback", callback)):
            if function is not None and not callable(function):
                raise ValueError(f"`{name}` must be a function or None, got {shown(function)}.")
        check_integer("lookahead_batch_size", lookahead_batch_size, 1, optional=True)
        if grid is not None and not (
            isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
        ):
            raise ValueError(f"`grid` must be a pair (height, width) of integers, or None, got {shown(grid)}.")
        if num_inference_steps is not None:
            scheduler = scheduler.with_timesteps(num_inference_steps, tokens.device)
        elif scheduler.timesteps is None:
            raise ValueError("`scheduler` has no timesteps: call its `set_timesteps` first, or give `num_inference_steps`.")
        generators = split_generator(generator, len(tokens))
        return cls(
            scheduler=scheduler,
            model=Model(denoise, scheduler.config.mask_token_id, lookahead_batch_size),
            seeds=[source.initial_seed() for source in generators],
            generators=generators,
            allowed=allowed,
            initial_masks=undecided.sum(-1),
            grid=grid,
            interrupted=interrupted or (lambda: False),
        )

    def undecided(self, tokens: torch.Tensor) -> torch.Tensor:
        """M_t of states (B, ..., L), a mask of the same shape."""
        if self.allowed is None:
            return self.scheduler.undecided(tokens)
        beams = (1,) * (tokens.ndim - 2)
        return self.scheduler.undecided(tokens, self.allowed.view(len(tokens), *beams, -1).expand(tokens.shape))

    def propose(
        self,
        logits: Logits,
        timestep: torch.Tensor,
        states: torch.Tensor,
        sample_index: torch.Tensor,
        memory: Memory | None,
    ) -> InfoGainProposal:
        """`InfoGainScheduler.propose` for states (R, L) of the samples `sample_index` (R,)."""
        return self.scheduler.propose(
            logits,
            timestep,
            states,
            None if self.allowed is None else self.allowed[sample_index],
            generator=[self.generators[index] for index in sample_index.tolist()],
            memory=memory,
            initial_masks=self.initial_masks[sample_index],
            grid=self.grid,
        )

    def look_ahead(
        self,
        timestep: torch.Tensor,
        proposal: InfoGainProposal,
        sample_index: torch.Tensor,
        wanted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Lookahead:
        """The lookahead of a proposal for the samples `sample_index` (R,)."""

        def run(candidates: CandidateIndex) -> Logits:
            return self.model.run(proposal.candidates[candidates], sample_index[candidates[0]])

        scheduler = self.scheduler
        return Lookahead(run, scheduler.objective, proposal, wanted, self.model.chunk, scheduler.step_index(timestep))


def _best_so_far(objective: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The first candidate (B, N) with the largest objective of those known."""
    winner = objective.masked_fill(~known, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(known).scatter(1, winner, True)


def _call_back(callback: Callback, step: DecodingStep) -> tuple[torch.Tensor, bool]:
    """The tokens after a callback, and whether their logits must be recomputed."""
    before = step.tokens.clone()  # the callback may change them in place
    edited = callback(step)
    tokens = step.tokens if edited is None else edited
    if tokens.shape != before.shape or tokens.dtype != before.dtype:
        raise ValueError(
            f"`callback` must return tokens of {before.dtype} {tuple(before.shape)}, got {tokens.dtype} {tuple(tokens.shape)}."
        )
    return tokens, step.recompute or not torch.equal(tokens, before)


@torch.no_grad()
def decode(
    denoise: Denoise,
    scheduler: InfoGainScheduler,
    tokens: torch.Tensor,
    *,
    allowed: torch.Tensor | None = None,
    generator: Generators = None,
    lookahead_batch_size: int | None = None,
    callback: Callback | None = None,
    grid: tuple[int, int] | None = None,
    num_inference_steps: int | None = None,
    interrupted: Interrupted | None = None,
) -> DecodingOutput:
    """Decodes every masked token (Algorithm 1 of arXiv 2602.18176; greedy samplers: one candidate per step).

    Args:
        denoise: `denoise(tokens, sample_index)` returns the logits (R, L, V), after guidance, of R states (R, L) of the samples
            `sample_index` (R,), or to save memory those at the M masks of `tokens` only, (M, V) in row-major order.
        scheduler: Its `set_timesteps` must have been called, or `num_inference_steps` be given. Decoding ends early when nothing
            is masked any more.
        tokens: (B, L) long. Known tokens stay as they are.
        allowed: (B, L) bool, the positions that may be decoded; by default all.
        generator: One generator, from which every sample gets its own (the first sample that one itself), or a list with one per
            sample: a sample comes out the same alone and in any batch, and again from its seed in the output.
        lookahead_batch_size: The most states that go through `denoise` at once; by default all candidates of all samples.
        callback: Called after each step with a `DecodingStep`. Tokens that it returns, or changes in place, replace the state,
            whose logits are then computed anew.
        grid: (height, width) of the tokens, for the halton order; by default a square.
        num_inference_steps: Decode in this many steps, with a copy of the scheduler, so that one may serve several threads.
        interrupted: Asked before every step; True ends the decoding, and what is masked stays masked.

    Raises:
        ValueError: For arguments that do not fit, or logits that cannot be sampled from (naming the step and the sample).
    """
    options = (allowed, generator, lookahead_batch_size, grid, num_inference_steps, interrupted, callback)
    run = Run.begin(denoise, scheduler, tokens, *options)
    samples = torch.arange(len(tokens), device=tokens.device)
    recorder = TraceRecorder()
    logits: Logits | None = None
    memory: Memory | None = None
    for index, timestep in enumerate(run.scheduler.timesteps):
        active = run.undecided(tokens).any(-1)
        if not active.any() or run.interrupted():
            break
        num_evaluations = torch.zeros_like(samples)
        if logits is None:
            logits = run.model.logits(tokens, samples, active)
            num_evaluations += active
        proposal = run.propose(logits, timestep, tokens, samples, memory)
        if proposal.needs_lookahead:
            seen = run.look_ahead(timestep, proposal, samples, _best_so_far)
            num_evaluations += proposal.distinct.sum(-1)
            winner = seen.objective.argmax(1)
            output = proposal.commit(winner, seen.gain, seen.objective, seen.logits(samples, winner))
        else:
            output = run.scheduler.select(None, timestep, proposal)
        recorder.record(proposal, output, num_evaluations)
        step = DecodingStep(index, timestep, output.prev_sample, logits, output.objective)
        tokens = output.prev_sample
        logits = output.pred_logits
        memory = proposal.memory
        if callback is not None:
            tokens, edited = _call_back(callback, step)
            if edited:
                logits = None
                memory = memory and memory.without_state()
        del step  # and with it logits that nobody needs any more
    if run.undecided(tokens).any() and not run.interrupted():
        raise ValueError("`callback` masked tokens again after the last step, where no step is left to decode them.")
    return DecodingOutput(tokens, recorder.trace(tokens.shape, run.scheduler.num_compared), run.seeds)
