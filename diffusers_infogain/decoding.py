"""The decoding loop: denoise, propose, look ahead, select (Algorithm 1 of arXiv 2602.18176), and retries of unlikely samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .candidates import Generators, split_generator
from .checks import check_grid, check_integer, check_tensor, check_type
from .denoising import Denoise, Denoised, Guide, Model
from .lookahead import CandidateIndex, Lookahead
from .masked_logits import Logits, take_states
from .printing import shown, summary
from .proposal import InfoGainProposal
from .reductions import Reader, statistics
from .scheduling_infogain import InfoGainScheduler
from .step import Memory
from .trace import DecodingTrace, TraceRecorder
from .trace_view import TraceView


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
        guide: Guide | None,
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
        for name, function in (("interrupted", interrupted), ("guide", guide), ("callback", callback)):
            if function is not None and not callable(function):
                raise ValueError(f"`{name}` must be a function or None, got {shown(function)}.")
        check_integer("lookahead_batch_size", lookahead_batch_size, 1, optional=True)
        check_grid("grid", grid)
        if num_inference_steps is not None:
            scheduler = scheduler.with_timesteps(num_inference_steps, tokens.device)
        elif scheduler.timesteps is None:
            raise ValueError("`scheduler` has no timesteps: call its `set_timesteps` first, or give `num_inference_steps`.")
        generators = split_generator(generator, len(tokens))
        return cls(
            scheduler=scheduler,
            model=Model(denoise, guide, scheduler.config.mask_token_id, lookahead_batch_size),
            seeds=[source.initial_seed() for source in generators],
            generators=generators,
            allowed=allowed,
            initial_masks=undecided.sum(-1),
            grid=grid,
            interrupted=interrupted or (lambda: False),
        )

    @property
    def view(self) -> TraceView:
        """What its traces are drawn with."""
        return TraceView(mask_token_id=self.scheduler.config.mask_token_id, grid=self.grid, lazy=self.scheduler.is_lazy)

    def undecided(self, tokens: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
        """M_t of states (R, ..., L) of the samples `sample_index` (R,), a mask of the same shape."""
        if self.allowed is None:
            return self.scheduler.undecided(tokens)
        beams = (1,) * (tokens.ndim - 2)
        allowed = self.allowed[sample_index].view(len(tokens), *beams, -1)
        return self.scheduler.undecided(tokens, allowed.expand(tokens.shape))

    def propose(
        self,
        logits: Logits,
        timestep: int,
        states: torch.Tensor,
        sample_index: torch.Tensor,
        memory: Memory | None,
        generators: list[torch.Generator],
    ) -> InfoGainProposal:
        """`InfoGainScheduler.propose` for states (R, L) of the samples `sample_index` (R,), which have these generators."""
        return self.scheduler.propose(
            logits,
            timestep,
            states,
            None if self.allowed is None else self.allowed[sample_index],
            generator=generators,
            memory=memory,
            initial_masks=self.initial_masks[sample_index],
            grid=self.grid,
        )

    def unguided(self, proposal: InfoGainProposal, logits: Logits, timestep: int) -> InfoGainProposal:
        """The proposal as candidates are compared without guidance: with what the `logits` of `denoise` say of its states."""
        if self.model.guide is None:
            return proposal
        reader = Reader(logits, proposal.masked, self.model.mask_token_id)
        found = statistics(reader, self.scheduler.compile_options)
        reader.check(found.top, self.scheduler.step_index(timestep))
        entropies = torch.zeros_like(proposal.entropies)
        entropies[proposal.masked] = found.entropy
        return replace(proposal, entropies=entropies, logits=None if proposal.logits is None else logits)

    def generators_of(self, sample_index: torch.Tensor) -> list[torch.Generator]:
        """Those of the samples `sample_index` (R,)."""
        return [self.generators[index] for index in sample_index.tolist()]

    def look_ahead(
        self,
        timestep: int,
        proposal: InfoGainProposal,
        sample_index: torch.Tensor,
        wanted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        accepted_from: float | None = None,
    ) -> Lookahead:
        """The lookahead of a proposal for the samples `sample_index` (R,)."""
        scheduler = self.scheduler

        def run(candidates: CandidateIndex) -> Denoised:
            return self.model.run(proposal.candidates[candidates], sample_index[candidates[0]])

        return Lookahead(
            run,
            scheduler.objective,
            proposal,
            wanted,
            self.model.chunk,
            scheduler.step_index(timestep),
            accepted_from,
        )


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


@dataclass(frozen=True)
class Likelihood:
    """What is known about how likely samples are, after some steps, (R,) each.

    Attributes:
        log_likelihood: S = Σ log p_l(v_l) of the tokens decoded, in nats.
        entropy: H~ = Σ H_l, in nats. If tokens are drawn from p_l, S + H~ is 0 on average.
        variance: The variance of S + H~ then, in nats².
    """

    log_likelihood: torch.Tensor
    entropy: torch.Tensor
    variance: torch.Tensor

    @classmethod
    def none(cls, rows: torch.Tensor) -> Likelihood:
        """Before the first step."""
        zeros = torch.zeros(rows.shape, dtype=torch.double, device=rows.device)
        return cls(zeros, zeros, zeros)

    def after(self, proposal: InfoGainProposal, winner: torch.Tensor) -> Likelihood:
        """With the step that takes the candidates `winner` (R,)."""
        if proposal.variance is None:
            raise ValueError("`proposal` must be of a scheduler that retries unlikely samples.")
        taken = torch.arange(len(winner), device=winner.device), winner
        return Likelihood(
            log_likelihood=self.log_likelihood + proposal.log_probability[taken].double(),
            entropy=self.entropy + proposal.cost[taken].double(),
            variance=self.variance + proposal.variance[taken].double(),
        )


@dataclass
class Attempt:
    """One way through the steps, from the same canvas: R samples, L positions.

    Attributes:
        tokens: (R, L) long, as they were left.
        recorder: Its steps.
        abandoned: (R,) bool, samples that fell below the limit, and whose tokens are void.
        first_logits: Of the canvas that the steps began with, if samples may be given up: those of `denoise`, and with guidance.
    """

    tokens: torch.Tensor
    recorder: TraceRecorder
    abandoned: torch.Tensor
    first_logits: tuple[Logits, Logits] | None


@torch.no_grad()
def attempt(
    run: Run,
    tokens: torch.Tensor,
    sample_index: torch.Tensor,
    known_logits: tuple[Logits, Logits] | None = None,
    *,
    callback: Callback | None = None,
    unlikely: Callable[[Likelihood], torch.Tensor] | None = None,
) -> Attempt:
    """The loop: decodes every masked token of the samples `sample_index` (R,).

    Args:
        tokens: (R, L) long.
        known_logits: (R, L, V) of `tokens`, if they are known: those of `denoise`, and with guidance.
        callback: As in `decode`.
        unlikely: `unlikely(likelihood)` (R,) bool says which samples are given up after a step.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    result = Attempt(tokens, TraceRecorder(), torch.zeros_like(rows, dtype=torch.bool), None)
    likelihood = Likelihood.none(rows)
    known_token = int(run.model.mask_token_id == 0)
    memory: Memory | None = None
    plain, logits = known_logits or (None, None)
    generators, timesteps = run.generators_of(sample_index), run.scheduler.all_timesteps
    # As numbers, and generators found once: a device that is asked in every step would have to wait.
    for index, timestep in enumerate(timesteps.tolist()):
        corrected, again, memory = run.scheduler.mask_again(tokens, run.undecided(tokens, sample_index), memory, run.grid)
        active = run.undecided(corrected, sample_index).any(-1) | again
        if not active.any() or run.interrupted():
            break
        tokens = corrected
        # Without a lookahead in the step before, the state has not been through the model yet.
        unseen = active if plain is None else again
        num_evaluations = num_compared = torch.zeros_like(rows)
        num_passes = unseen.long()
        if plain is None or unseen.any():
            plain, num_evaluations = run.model.logits(tokens, sample_index, unseen, plain)
        if logits is None:
            logits, more = run.model.guided(plain, tokens, sample_index, active)
            num_evaluations = num_evaluations + more
            num_passes = num_passes + (active & more.any())
        if index == 0 and unlikely is not None:  # kept for the next try
            result.first_logits = plain, logits
        proposal = run.propose(logits, timestep, tokens, sample_index, memory, generators)
        if proposal.needs_lookahead:
            lazy_threshold = run.scheduler.config.lazy_threshold if run.scheduler.is_lazy else None
            compared = run.unguided(proposal, plain, timestep)
            seen = run.look_ahead(timestep, compared, sample_index, _best_so_far, lazy_threshold)
            num_compared = seen.ran.sum(-1)
            num_evaluations = num_evaluations + seen.num_evaluations
            num_passes = num_passes + seen.num_passes
            # The winner's logits are those of the new state.
            output = proposal.commit(seen.winner, seen.gain, seen.objective, seen.logits(rows, seen.winner))
        else:
            output = run.scheduler.select(None, timestep, proposal)
        counts = {
            "num_compared": num_compared,
            "num_states": unseen + num_compared,
            "num_evaluations": num_evaluations,
            "num_passes": num_passes,
        }
        step = DecodingStep(index, timesteps[index], output.prev_sample, logits, output.objective)
        tokens = output.prev_sample
        plain, logits = output.pred_logits, None
        memory = proposal.memory
        if callback is not None:
            tokens, edited = _call_back(callback, step)
            if edited:
                plain = None
                memory = memory and memory.without_state()
        result.recorder.record(proposal, output, tokens, counts)
        if unlikely is not None:
            likelihood = likelihood.after(proposal, output.winner)
            result.abandoned |= unlikely(likelihood) & active
            # With nothing masked they take no further part.
            tokens = torch.where(result.abandoned[:, None] & (tokens == run.model.mask_token_id), known_token, tokens)
        del step  # frees logits that are not needed any more before the next ones are made
    result.tokens = tokens
    return result


def _unlikely(config: Any, likelihood: Likelihood) -> torch.Tensor:
    """(R,) bool, samples to give up by the settings `retry_below_nats`, `retry_above_nats` and `retry_below_sigmas`."""
    below = torch.zeros_like(likelihood.entropy, dtype=torch.bool)
    if config.retry_below_nats is not None:
        below |= likelihood.log_likelihood < config.retry_below_nats
    if config.retry_above_nats is not None:
        below |= likelihood.entropy - likelihood.log_likelihood > config.retry_above_nats
    if config.retry_below_sigmas is not None:
        below |= likelihood.log_likelihood + likelihood.entropy < config.retry_below_sigmas * likelihood.variance.sqrt()
    return below


def _decode_with_retries(run: Run, tokens: torch.Tensor) -> DecodingOutput:
    """Begins samples anew as soon as they turn out unlikely, at most `num_tries` times each.

    The log-likelihood of what is committed adds up at no cost, and the canvas' own logits are kept for the next try. So a sample
    that passes takes what it takes without retries, and is the same.
    """
    num_tries = run.scheduler.config.num_tries
    # Each try has a generator of its own, the first one the sample's, whatever becomes of the tries before.
    sources = [torch.Generator(own.device).manual_seed(own.initial_seed()) for own in run.generators]
    sample_index = torch.arange(len(tokens), device=tokens.device)
    decoded = tokens.clone()
    logits: tuple[Logits, Logits] | None = None
    traces = []
    for number in range(num_tries):
        run = replace(run, generators=[split_generator(source, 1)[0] for source in sources])
        unlikely = partial(_unlikely, run.scheduler.config) if number < num_tries - 1 else None
        result = attempt(run, tokens[sample_index], sample_index, logits, unlikely=unlikely)
        trace = _trace_of(result, tokens[sample_index], run)
        traces.append(trace.within(decoded.cpu(), sample_index.cpu()))
        decoded[sample_index] = result.tokens
        again = result.abandoned.nonzero()[:, 0]
        if not len(again):
            break
        sample_index = sample_index[again]
        decoded[sample_index] = tokens[sample_index]
        if run.interrupted():
            break
        if result.first_logits is not None:
            plain, guided = result.first_logits
            logits = take_states(plain, again), take_states(guided, again)
    return DecodingOutput(decoded, replace(DecodingTrace.join(traces), view=run.view), run.seeds)


def _trace_of(result: Attempt, tokens: torch.Tensor, run: Run) -> DecodingTrace:
    """The trace of a try that began with `tokens` (R, L); what abandoned samples decoded in it is void."""
    trace = result.recorder.trace(tokens.shape, run.scheduler.num_compared, run.view)
    abandoned = result.abandoned.cpu()
    trace.entropies[:, abandoned] = torch.nan
    trace.tokens[:, abandoned] = tokens.cpu().int()[abandoned]
    trace.num_decoded[:, abandoned] = 0
    trace.cost[:, abandoned] = 0
    trace.gain[:, abandoned] = torch.nan
    trace.selected[:, abandoned] = False
    trace.log_probability[:, abandoned] = 0
    return trace


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
    guide: Guide | None = None,
) -> DecodingOutput:
    """Decodes every masked token (Algorithm 1 of arXiv 2602.18176; greedy samplers: one candidate per step).

    Args:
        denoise: `denoise(tokens, sample_index)` returns the logits (R, L, V), after guidance, of R states (R, L) of the samples
            `sample_index` (R,), or to save memory those at the M masks of `tokens` only, (M, V) in row-major order, or at any
            positions that include these, as `MaskedLogits`. It may return them as `Denoised`, which says how many rows of the
            network each state took; by default one.
        scheduler: Its `set_timesteps` must have been called, or `num_inference_steps` be given. Decoding ends early when nothing
            is masked any more.
        tokens: (B, L) long. Known tokens stay as they are.
        allowed: (B, L) bool, the positions that may be decoded; by default all.
        generator: One generator, from which every sample gets its own (the first sample that one itself), or a list with one per
            sample: a sample comes out the same alone and in any batch, and again from its seed in the output.
        lookahead_batch_size: The most states that go through `denoise` at once; by default all candidates of all samples.
        callback: Called after each step with a `DecodingStep`. Tokens that it returns, or changes in place, replace the state,
            whose logits are then computed anew.
        grid: (height, width) of the tokens, for the halton order; by default a square, or a line if L is no square number.
        num_inference_steps: Decode in this many steps, with a copy of the scheduler, so that one may serve several threads.
        interrupted: Asked before every step; True ends the decoding, and what is masked stays masked.
        guide: For a lookahead without guidance. `denoise` then returns the logits that candidates are compared by, and
            `guide(logits, tokens, sample_index)` the `Denoised` ones that tokens are drawn from, given `denoise`'s (R, L, V) of
            the states (R, L) that are decoded further.

    If the scheduler begins unlikely samples anew, the trace has the steps of all tries one after the other. Those of an abandoned
    try have evaluations, but decode nothing and cost nothing.

    Raises:
        ValueError: For arguments that do not fit, or logits that cannot be sampled from (naming the step and the sample).
    """
    options = (allowed, generator, lookahead_batch_size, grid, num_inference_steps, interrupted, guide, callback)
    run = Run.begin(denoise, scheduler, tokens, *options)
    if run.scheduler.retries:
        if callback is not None:
            raise ValueError("`callback` must be None with a scheduler that begins samples anew (`retry_...`).")
        return _decode_with_retries(run, tokens)
    samples = torch.arange(len(tokens), device=tokens.device)
    result = attempt(run, tokens, samples, callback=callback)
    if run.undecided(result.tokens, samples).any() and not run.interrupted():
        raise ValueError("`callback` masked tokens again after the last step, where no step is left to decode them.")
    return DecodingOutput(result.tokens, result.recorder.trace(tokens.shape, run.scheduler.num_compared, run.view), run.seeds)
