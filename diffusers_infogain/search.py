"""Searches on top of the loop: beams, and the best of several runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from .candidates import Generators, split_generator
from .checks import check_integer, check_type
from .decoding import Callback, DecodingOutput, Interrupted, Run, decode
from .denoising import Denoise, Guide
from .masked_logits import Logits
from .proposal import InfoGainProposal
from .scheduling_infogain import InfoGainScheduler
from .step import Memory
from .trace import TraceRecorder


@dataclass(frozen=True)
class Beams:
    """K states per sample and what they have cost. B samples, L positions.

    Attributes:
        states: (B, K, L) long.
        cost: (B, K) float64, g in nats; inf where there is no beam, only a copy of a state that never wins.
        alive: (B, K) bool, beams with masks left.
    """

    states: torch.Tensor
    cost: torch.Tensor
    alive: torch.Tensor

    @classmethod
    def of(cls, run: Run, states: torch.Tensor, cost: torch.Tensor) -> Beams:
        """Beams, of which those with masks left are alive."""
        return cls(states, cost, cost.isfinite() & run.undecided(states, torch.arange(len(states), device=states.device)).any(-1))

    @property
    def sample_index(self) -> torch.Tensor:
        """(R,) the samples of the R living beams, in the order of `states[alive]`."""
        return self.alive.nonzero(as_tuple=True)[0]


class Expansion:
    """Every beam's N candidates: K · N states per sample, finished beams being one candidate of their own.

    f = g + C + w · 𝓗(z') = g + w · 𝓗(z) - J is computed in float64: one beam then decides as argmax J does, to the last bit. With
    "kl", 𝓗(z) less the gain is what z' is expected to leave.

    Args:
        base: (R,) g + w · 𝓗(z) of the R living beams, from which J of a candidate is taken.
    """

    def __init__(self, beams: Beams, proposal: InfoGainProposal, base: torch.Tensor):
        self.beams = beams
        self.proposal = proposal
        self.base = base
        self.num_candidates = proposal.candidates.shape[1]
        copies = beams.states[:, :, None].expand(-1, -1, self.num_candidates, -1).clone()
        copies[beams.alive] = proposal.candidates
        self.states = copies.flatten(1, 2)
        # (B, K · N, K · N): beams that reach the same state by different ways go on as one.
        self.equal = (self.states[:, :, None] == self.states[:, None]).all(-1)

    def rank(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K smallest f of each sample, (B, K), and where among its K · N candidates they stand.

        Args:
            value: (R, N) float64, J of the living beams' candidates.
        """
        beams = self.beams
        f = torch.full((*beams.alive.shape, self.num_candidates), torch.inf, dtype=torch.double, device=value.device)
        f[..., 0] = torch.where(beams.alive, torch.inf, beams.cost)
        f[beams.alive] = self.base[:, None] - value
        f, place = _once(f.flatten(1), self.equal).sort(dim=1, stable=True)
        num_beams = beams.alive.shape[1]
        return f[:, :num_beams], place[:, :num_beams]

    def among_best(self, objective: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Which candidates (R, N) of the living beams would go on as beams if only the `known` ones (R, N) were there."""
        f, place = self.rank(objective.double().masked_fill(~known, -torch.inf))
        alive = self.beams.alive
        chosen = torch.zeros(len(alive), alive.shape[1] * self.num_candidates, dtype=torch.bool, device=f.device)
        return chosen.scatter(1, place, f.isfinite()).view(*alive.shape, -1)[alive]

    def _at(self, place: torch.Tensor, value: torch.Tensor, finished: float = 0) -> torch.Tensor:
        """(R, N, ...) of the living beams' candidates at `place` (B, K), as (B, K, ...), with `finished` for finished beams."""
        full = value.new_full((*self.beams.alive.shape, *value.shape[1:]), finished)
        full[self.beams.alive] = value
        return full.flatten(1, 2)[torch.arange(len(place), device=place.device)[:, None], place]

    def _states_at(self, place: torch.Tensor) -> torch.Tensor:
        """The states (B, K, L) of the candidates at `place` (B, K)."""
        return self.states[torch.arange(len(place), device=place.device)[:, None], place]

    def record(self, place: torch.Tensor, gain: torch.Tensor, objective: torch.Tensor) -> dict[str, torch.Tensor]:
        """The step by which the candidates at `place` (B, K) become beams: fields of a trace, (B, K, ...), and "parent"."""
        proposal = self.proposal
        entropies = proposal.entropies.masked_fill(~proposal.masked, torch.nan)
        return {
            "parent": place // self.num_candidates,
            "num_decoded": self._at(place, proposal.num_decoded),
            "cost": self._at(place, proposal.cost),
            "log_probability": self._at(place, proposal.log_probability),
            "gain": self._at(place, gain),
            "objective": self._at(place, objective[:, None].expand(-1, self.num_candidates, -1)),
            "winner": place % self.num_candidates,
            "selected": self._at(place, proposal.selected),
            "entropies": self._at(place, entropies[:, None].expand(-1, self.num_candidates, -1), torch.nan),
            "tokens": self._states_at(place).int(),
        }

    def keep(self, run: Run, f: torch.Tensor, place: torch.Tensor) -> Beams:
        """The candidates at `place` (B, K) as beams; those with f = inf are none."""
        cost = self.beams.cost.gather(1, place // self.num_candidates) + self._at(place, self.proposal.cost).double()
        return Beams.of(run, self._states_at(place), torch.where(f.isfinite(), cost, torch.inf))

    def parent_row(self, parent: torch.Tensor) -> torch.Tensor:
        """Which of the R living beams a beam `parent` (B, K) of this step is, (B, K)."""
        alive = self.beams.alive
        number = torch.zeros(alive.shape, dtype=torch.long, device=alive.device)
        number[alive] = torch.arange(int(alive.sum()), device=alive.device)
        return number.gather(1, parent)


def _once(f: torch.Tensor, equal: torch.Tensor) -> torch.Tensor:
    """f (B, K) with inf for every state that another one equals (B, K, K) with a smaller f, or with the same f and earlier."""
    place = torch.arange(f.shape[1], device=f.device)
    better = (f[:, None] < f[:, :, None]) | ((f[:, None] == f[:, :, None]) & (place < place[:, None]))
    return f.masked_fill((equal & better).any(-1), torch.inf)


_COUNTS = ("num_compared", "num_states", "num_evaluations", "num_passes")
"""Fields of a trace that count what all beams of a sample took together."""


def _counts(
    batch: int,
    owners: torch.Tensor,
    unseen: torch.Tensor,
    num_compared: torch.Tensor,
    num_evaluations: torch.Tensor,
    num_passes: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """`_COUNTS` of a step (B,), from those of the R beams of the samples `owners` (R,)."""
    zeros = torch.zeros(batch, dtype=torch.long, device=owners.device)
    return {
        "num_compared": zeros.index_add(0, owners, num_compared),
        "num_states": zeros.index_add(0, owners, unseen + num_compared),
        "num_evaluations": zeros.index_add(0, owners, num_evaluations),
        "num_passes": zeros.scatter_reduce(0, owners, num_passes, "amax"),  # all beams go together
    }


def _path(history: list[dict[str, torch.Tensor]], beam: torch.Tensor) -> TraceRecorder:
    """The steps that led to `beam` (B,) after the last step."""
    samples = torch.arange(len(beam))
    recorder = TraceRecorder()
    for record in reversed(history):
        own = {name: value[samples, beam] for name, value in record.items() if name not in ("parent", *_COUNTS)}
        recorder.add(**own, **{name: record[name] for name in _COUNTS})
        beam = record["parent"][samples, beam]
    recorder.steps.reverse()
    return recorder


def _check_beams(scheduler: InfoGainScheduler, num_beams: int) -> None:
    """Raises a ValueError if this is no scheduler for a beam search, or no number of beams."""
    check_type("scheduler", scheduler, InfoGainScheduler, "an InfoGainScheduler")
    if not scheduler.looks_ahead or not scheduler.objective.weighs_cost:
        raise ValueError(
            f"`scheduler` must use the sampler 'info_gain' with at least 2 candidates for a beam search, got "
            f"{scheduler.config.sampler!r} with {scheduler.config.num_candidates}."
        )
    if scheduler.retries:
        raise ValueError("The retries of the scheduler (`retry_...`) must be None for a beam search.")
    if scheduler.config.corrector is not None:
        raise ValueError(f"`corrector` of the scheduler must be None for a beam search, got {scheduler.config.corrector!r}.")
    check_integer("num_beams", num_beams, 1)


@torch.no_grad()
def decode_beam(
    denoise: Denoise,
    scheduler: InfoGainScheduler,
    tokens: torch.Tensor,
    *,
    num_beams: int,
    allowed: torch.Tensor | None = None,
    generator: Generators = None,
    lookahead_batch_size: int | None = None,
    grid: tuple[int, int] | None = None,
    num_inference_steps: int | None = None,
    interrupted: Interrupted | None = None,
    guide: Guide | None = None,
) -> DecodingOutput:
    """Info-Gain beam search: keeps the K states with the smallest cost so far plus remaining uncertainty.

    Every beam (z, g), g = 0 at first, is expanded by N candidates to g' = g + C(a | z) and f = g' + w · 𝓗(z'); the `num_beams`
    smallest f of all beams go on, equal states once. At the end the smallest g is returned. One beam is `decode`, draw for
    draw. Arguments as in `decode`; the trace is the returned path's, its `num_evaluations` are those of all beams.

    Raises:
        ValueError: If the sampler is not "info_gain" with at least two candidates, or `num_beams` < 1.
    """
    _check_beams(scheduler, num_beams)
    options = (allowed, generator, lookahead_batch_size, grid, num_inference_steps, interrupted, guide)
    run = Run.begin(denoise, scheduler, tokens, *options)
    scheduler = run.scheduler
    samples = torch.arange(len(tokens), device=tokens.device)
    cost = torch.full((len(tokens), num_beams), torch.inf, dtype=torch.double, device=tokens.device)
    cost[:, 0] = 0
    beams = Beams.of(run, tokens[:, None].expand(-1, num_beams, -1), cost)
    history: list[dict[str, torch.Tensor]] = []
    plain: Logits | None = None
    memory: Memory | None = None
    for timestep in scheduler.timesteps.tolist():
        if not beams.alive.any() or run.interrupted():
            break
        states, owners = beams.states[beams.alive], beams.sample_index
        every = torch.ones_like(owners, dtype=torch.bool)
        unseen = every & (plain is None)
        num_evaluations = num_compared = torch.zeros_like(owners)
        if plain is None:
            plain, num_evaluations = run.model.logits(states, owners, every)
        logits, more = run.model.guided(plain, states, owners, every)
        num_passes = unseen.long() + more.any()
        proposal = run.propose(logits, timestep, states, owners, memory, run.generators_of(owners))
        looks = proposal.needs_lookahead
        compared = run.unguided(proposal, plain, timestep) if looks else proposal
        remaining = scheduler.config.gain_weight * scheduler.objective.uncertainty(compared).double() if looks else 0
        expansion = Expansion(beams, proposal, beams.cost[beams.alive] + remaining)
        if looks:
            seen = run.look_ahead(timestep, compared, owners, expansion.among_best)
            num_compared = seen.ran.sum(-1)
            more = more + seen.num_evaluations
            num_passes = num_passes + seen.num_passes
            gain, objective = seen.gain, seen.objective
            value = objective.double()
        else:  # all candidates of a beam are one state, or finished ones of equal cost
            gain, objective = scheduler.objective(None, proposal)
            value = torch.full_like(objective.double(), -torch.inf)
            value[:, 0] = -proposal.cost[:, 0].double()
        # The K best candidates of each sample, whichever beams they come from, are its beams from now on.
        f, place = expansion.rank(value)
        record = expansion.record(place, gain, objective)
        step = record | _counts(len(tokens), owners, unseen, num_compared, num_evaluations + more, num_passes)
        history.append({name: value.cpu() for name, value in step.items()})  # all beams of all steps would fill a device
        beams = expansion.keep(run, f, place)
        # Memory and logits follow a beam's parent among the rows that were just proposed for.
        rows = expansion.parent_row(record["parent"])[beams.alive]
        memory = proposal.memory and proposal.memory.take(rows)
        plain = seen.logits(rows, record["winner"][beams.alive]) if looks else None
    best = beams.cost.argmin(1)
    trace = _path(history, best.cpu()).trace(tokens.shape, scheduler.num_compared, replace(run.view, lazy=False))
    return DecodingOutput(beams.states[samples, best], trace, run.seeds)


def decode_best_of(
    denoise: Denoise,
    scheduler: InfoGainScheduler,
    tokens: torch.Tensor,
    *,
    num_runs: int,
    allowed: torch.Tensor | None = None,
    generator: Generators = None,
    lookahead_batch_size: int | None = None,
    grid: tuple[int, int] | None = None,
    num_inference_steps: int | None = None,
    interrupted: Interrupted | None = None,
    guide: Guide | None = None,
) -> DecodingOutput:
    """Best-of-N: decodes every sample `num_runs` times and returns the best run by the setting `best_run_by`.

    That is the run with the smallest cumulative entropy H~, the largest log-likelihood S, or the smallest H~ - S. Arguments as
    in `decode`; the trace is the returned run's, with the evaluations of all runs together. Runs within 1e-4 nats of the best
    count as equal, so that rounding decides nothing; the first of them is taken.
    """
    check_integer("num_runs", num_runs, 1)
    options = (allowed, generator, lookahead_batch_size, grid, num_inference_steps, interrupted, guide)
    run = Run.begin(denoise, scheduler, tokens, *options)
    batch = len(tokens)
    generators = [child for source in run.generators for child in split_generator(source, num_runs)]
    output = decode(
        lambda states, sample_index: denoise(states, sample_index // num_runs),
        scheduler,
        tokens.repeat_interleave(num_runs, 0),
        allowed=None if allowed is None else allowed.repeat_interleave(num_runs, 0),
        generator=generators,
        lookahead_batch_size=lookahead_batch_size,
        grid=grid,
        num_inference_steps=num_inference_steps,
        interrupted=interrupted,
        guide=guide and (lambda logits, states, sample_index: guide(logits, states, sample_index // num_runs)),
    )
    runs = output.trace
    scores = {
        "cumulative_entropy": -runs.cumulative_entropy,
        "log_likelihood": runs.log_likelihood,
        "entropy_and_likelihood": runs.log_likelihood - runs.cumulative_entropy,
    }
    score = scores[scheduler.config.best_run_by].view(batch, num_runs)
    winner = (score >= score.amax(1, keepdim=True) - 1e-4).int().argmax(1)
    best = torch.arange(batch) * num_runs + winner
    trace = runs.take(best)
    for name in ("num_compared", "num_states", "num_evaluations"):
        setattr(trace, name, getattr(runs, name).view(-1, batch, num_runs).sum(-1))
    trace.num_passes = runs.num_passes.view(-1, batch, num_runs).amax(-1)  # the runs go side by side
    return DecodingOutput(output.tokens[best.to(tokens.device)], trace, run.seeds)


def decode_or_search(
    denoise: Denoise,
    scheduler: InfoGainScheduler,
    tokens: torch.Tensor,
    *,
    num_beams: int = 1,
    num_runs: int = 1,
    callback: Callback | None = None,
    **options: Any,
) -> DecodingOutput:
    """`decode_beam` or `decode_best_of` where one of the numbers is above 1, else `decode`; other arguments as in all of them.

    The callback follows neither a search nor samples that are begun anew: it is not called then.

    Raises:
        torch.OutOfMemoryError: If memory runs out, naming the argument that lowers it.
    """
    try:
        if num_beams > 1:
            return decode_beam(denoise, scheduler, tokens, num_beams=num_beams, **options)
        if num_runs > 1:
            return decode_best_of(denoise, scheduler, tokens, num_runs=num_runs, **options)
        return decode(denoise, scheduler, tokens, callback=None if scheduler.retries else callback, **options)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        at_once = options.get("lookahead_batch_size")
        remedy = "a smaller one" if at_once else "give one, such as 8"
        reason = (str(error).splitlines() or ["no memory is left"])[0]
        raise torch.OutOfMemoryError(
            f"Out of memory with {len(tokens)} samples and `lookahead_batch_size` = {at_once}, the most states in the model at "
            f"once: {remedy}, or fewer samples at once, may do: {reason}"
        ) from error
