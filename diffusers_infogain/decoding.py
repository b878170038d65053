"""The decoding loop: denoise, propose, look ahead, select. Beam search and best-of-N on top of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from . import scoring
from .candidates import Generators, split_generator
from .checks import check_integer, check_tensor, check_type
from .lookahead import Lookahead, Rows
from .masked_logits import Logits, MaskedLogits, concatenate, take_states
from .printing import shown, summary
from .scheduling_infogain import InfoGainProposal, InfoGainScheduler

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def count_model_calls(model_rows: torch.Tensor, looks_ahead: bool, starts: torch.Tensor | None = None) -> torch.Tensor:
    """How often the model ran in sequence for each sample, (B,), from its rows per step (T, B).

    What decoding costs where candidates and runs fit on the device beside each other: one call a step, and in a step that begins
    a canvas (`starts` (T, B); by default the first) with a lookahead two, for the empty canvas and then for the candidates, if
    they differ. (After a step in which all candidates of a batch coincided the next one has a call more, which the rows do not
    tell and which is not counted.)
    """
    calls = (model_rows > 0).sum(0)
    if not looks_ahead:
        return calls
    return calls + (model_rows[:1] > 1 if starts is None else starts & (model_rows > 1)).sum(0)


@dataclass
class DecodingTrace:
    """What happened, per step and sample: T steps, B samples, N candidates, L positions. Entropies in nats.

    Attributes:
        num_decoded: (T, B) long, tokens committed.
        cost: (T, B) float32, C of the committed action.
        gain: (T, B) float32, its information gain; NaN where no lookahead told it.
        objective: (T, B, N) float32, J of every candidate; NaN where no lookahead told it.
        winner: (T, B) long, the committed candidate; 0 is the greedy one.
        selected: (T, B, L) bool, the positions committed.
        model_rows: (T, B) long, rows that went through `denoise` for the sample in the step.
        starts: (T, B) bool, steps that begin a canvas: several where blocks of a text were decoded one after the other.
    """

    num_decoded: torch.Tensor
    cost: torch.Tensor
    gain: torch.Tensor
    objective: torch.Tensor
    winner: torch.Tensor
    selected: torch.Tensor
    model_rows: torch.Tensor
    starts: torch.Tensor

    @property
    def cumulative_entropy(self) -> torch.Tensor:
        """H~ = Σ_t C(a_t | z_t) per sample (B,), over every commit."""
        return self.cost.sum(0)

    @property
    def model_calls(self) -> torch.Tensor:
        """(B,) long: how often the model ran one after the other, `count_model_calls`."""
        return count_model_calls(self.model_rows, looks_ahead=self.objective.shape[-1] > 1, starts=self.starts)

    @property
    def decoded_at(self) -> torch.Tensor:
        """(B, L) long: the (last) step in which a position was decoded, -1 where it was known."""
        number = torch.arange(len(self.selected))[:, None, None].expand(self.selected.shape)
        known = torch.full((1, *self.selected.shape[1:]), -1)
        return torch.cat([known, number.masked_fill(~self.selected, -1)]).amax(0)

    def records(self) -> list[dict[str, list[float] | list[int]]]:
        """Per sample, plain lists over the steps, for JSON: "num_decoded", "cost", "winner", "model_rows"."""
        names = ("num_decoded", "cost", "winner", "model_rows")
        columns = [getattr(self, name).T.tolist() for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def __repr__(self) -> str:
        steps, batch = self.winner.shape
        per_sample = (("model rows", self.model_rows.sum(0)), ("nats of cumulative entropy", self.cumulative_entropy))
        figures = [f"{value.double().mean():.1f} {name}" for name, value in per_sample if batch]
        candidates = f", {self.objective.shape[-1]} candidates" if self.objective.shape[-1] > 1 else ""
        return f"DecodingTrace: {batch} samples in {steps} steps{candidates}; per sample {' and '.join(figures) or 'nothing'}"

    def take(self, rows: torch.Tensor) -> DecodingTrace:
        """The trace of some of the samples."""
        return DecodingTrace(**{name: value[:, rows] for name, value in vars(self).items()})


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
        scores: (B, N) float32, J of every candidate; NaN where no lookahead told it.
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


class _TraceRecorder:
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def record(self, **values: torch.Tensor) -> None:
        self.steps.append({name: value.cpu() for name, value in values.items()})

    def trace(self, batch: int, length: int, num: int) -> DecodingTrace:
        if not self.steps:
            none, real = torch.zeros(0, batch, dtype=torch.long), torch.zeros(0, batch, dtype=torch.float32)
            selected = torch.zeros(0, batch, length, dtype=torch.bool)
            return DecodingTrace(none, real, real, real[..., None].expand(-1, -1, num), none, selected, none, none.bool())
        starts = torch.arange(len(self.steps))[:, None].expand(-1, batch) == 0
        columns = {name: torch.stack([step[name] for step in self.steps]) for name in self.steps[0]}
        return DecodingTrace(**columns, starts=starts)


def _run(denoise: Denoise, mask_token_id: int, states: torch.Tensor, rows: torch.Tensor) -> Logits:
    """Logits (R, L, V) of states (R, L) of the samples `rows` (R,)."""
    logits = denoise(states, rows)
    return logits if logits.ndim == 3 else MaskedLogits.at(states == mask_token_id, logits)


def _forward(
    denoise: Denoise, mask_token_id: int, tokens: torch.Tensor, where: torch.Tensor, rows: torch.Tensor, chunk: int | None
) -> Logits:
    """Logits (R, L, V) of the states `tokens` (R, L) of the samples `rows` (R,), run in chunks where `where` (R,) is true.

    States that did not run are never read, but stay finite.
    """
    states, samples = tokens[where], rows[where]
    size = chunk or len(states)
    parts = zip(states.split(size), samples.split(size), strict=True)
    logits = concatenate([_run(denoise, mask_token_id, *part) for part in parts])
    return take_states(logits, torch.where(where, where.cumsum(0) - 1, -1))


def _checked(
    tokens: torch.Tensor,
    scheduler: InfoGainScheduler,
    num_inference_steps: int | None,
    lookahead_batch_size: int | None,
    grid: tuple[int, int] | None,
    allowed: torch.Tensor | None,
    **functions: Callable[..., Any] | None,
) -> InfoGainScheduler:
    """The scheduler with the timesteps of a run, after a check of what all ways of decoding are given."""
    check_tensor("tokens", tokens, [2], "a long tensor (batch, length)", [torch.long])
    check_type("scheduler", scheduler, InfoGainScheduler, "an InfoGainScheduler")
    scheduler.undecided(tokens, allowed)
    for name, one in functions.items():
        if not callable(one) and (one is not None or name == "denoise"):
            raise ValueError(f"`{name}` must be a function{'' if name == 'denoise' else ' or None'}, got {shown(one)}.")
    check_integer("lookahead_batch_size", lookahead_batch_size, 1, optional=True)
    if grid is not None and not (
        isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)
    ):
        raise ValueError(f"`grid` must be a pair (height, width) of integers, or None, got {shown(grid)}.")
    if num_inference_steps is not None:
        return scheduler.with_timesteps(num_inference_steps, tokens.device)
    if scheduler.timesteps is None:
        raise ValueError("`scheduler` has no timesteps: call its `set_timesteps` first, or give `num_inference_steps`.")
    return scheduler


def _own_generators(generator: Generators, batch_size: int) -> tuple[list[int], list[torch.Generator]]:
    """Every sample's seed, and its generator."""
    generators = split_generator(generator, batch_size)
    return [one.initial_seed() for one in generators], generators


def _look_ahead(
    denoise: Denoise,
    scheduler: InfoGainScheduler,
    timestep: torch.Tensor,
    proposal: InfoGainProposal,
    samples: torch.Tensor,
    chunk: int | None,
    wanted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Lookahead:
    """The lookahead of a proposal whose rows belong to `samples` (R,)."""

    def run(rows: Rows) -> Logits:
        return _run(denoise, scheduler.config.mask_token_id, proposal.candidates[rows], samples[rows[0]])

    return Lookahead(run, scheduler, timestep, proposal, wanted, chunk)


def _best_so_far(objective: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """The first candidate (B, N) with the largest objective of those known."""
    winner = objective.masked_fill(~known, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(known).scatter(1, winner, True)


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
    """Decodes every masked token (Algorithm 1 of arXiv 2602.18176; greedy samplers: one candidate a step).

    Args:
        denoise: `denoise(tokens, rows)` gives the logits (R, L, V), after guidance, of R states (R, L), where `rows` (R,) tells
            which sample (its prompt, its masks) each belongs to. Rows of finished samples are left out. To save memory it may
            give those at masked positions only, (M, V) for the M masks of `tokens`, in row-major order.
        scheduler: Its `set_timesteps` must have been called, or `num_inference_steps` be given. Steps end early when nothing is
            masked any more.
        tokens: (B, L) long. Known tokens stay as they are.
        allowed: (B, L) bool, the positions that may be decoded; by default all.
        generator: One generator, from which every sample gets its own (the first sample that one itself), or a list with one per
            sample: a sample comes out the same alone and in any batch, and again from its seed in the output.
        lookahead_batch_size: The most rows that go through `denoise` at once; by default all candidates of all samples.
        callback: Called after each step with a `DecodingStep`. Tokens that it returns, or changes in place, replace the state,
            whose logits are then computed anew.
        grid: (height, width) of the tokens, for the halton order; by default a square.
        num_inference_steps: Decode in so many steps, with a copy of the scheduler: one scheduler may then serve several threads.
        interrupted: Asked before every step; True ends the decoding, and what is masked stays so.

    Raises:
        ValueError: For arguments that do not fit, or logits that cannot be sampled from (naming the step and the sample).
    """
    scheduler = _checked(
        tokens,
        scheduler,
        num_inference_steps,
        lookahead_batch_size,
        grid,
        allowed,
        denoise=denoise,
        interrupted=interrupted,
        callback=callback,
    )
    seeds, generators = _own_generators(generator, len(tokens))
    samples, recorder = torch.arange(len(tokens), device=tokens.device), _TraceRecorder()
    initial_masks, mask_token_id = scheduler.undecided(tokens, allowed).sum(-1), scheduler.config.mask_token_id
    halton_offsets = scheduler.draw_halton_offsets(generators, tokens.shape[1])
    logits: Logits | None = None
    previous_logits: Logits | None = None
    settled: torch.Tensor | None = None
    for index, timestep in enumerate(scheduler.timesteps):
        active = scheduler.undecided(tokens, allowed).any(-1)
        if not active.any() or (interrupted is not None and interrupted()):
            break
        model_rows = torch.zeros_like(samples)
        if logits is None:
            logits = _forward(denoise, mask_token_id, tokens, active, samples, lookahead_batch_size)
            model_rows += active
        proposal = scheduler.propose(
            logits,
            timestep,
            tokens,
            allowed,
            generator=generators,
            previous_logits=previous_logits,
            initial_masks=initial_masks,
            grid=grid,
            halton_offsets=halton_offsets,
            settled=settled,
        )
        if proposal.needs_lookahead:
            seen = _look_ahead(denoise, scheduler, timestep, proposal, samples, lookahead_batch_size, _best_so_far)
            model_rows += proposal.distinct.sum(-1)
            winner = seen.objective.argmax(1)
            output = proposal.commit(winner, seen.gain, seen.objective, seen.logits(samples, winner))
        else:
            output = scheduler.select(None, timestep, proposal)
        tokens, previous_logits, logits = output.prev_sample, logits, output.pred_logits
        settled = proposal.settled
        recorder.record(
            num_decoded=proposal.num_decoded[samples, output.winner],
            cost=proposal.cost[samples, output.winner],
            gain=output.gain[samples, output.winner],
            objective=output.objective,
            winner=output.winner,
            selected=proposal.selected[samples, output.winner],
            model_rows=model_rows,
        )
        if callback is not None:
            before = tokens.clone()
            step = DecodingStep(index, timestep, tokens, previous_logits, output.objective)
            edited = callback(step)
            tokens = tokens if edited is None else edited
            if tokens.shape != before.shape or tokens.dtype != before.dtype:
                raise ValueError(
                    f"`callback` must return tokens of {before.dtype} {tuple(before.shape)}, "
                    f"got {tokens.dtype} {tuple(tokens.shape)}."
                )
            if step.recompute or not torch.equal(tokens, before):
                logits = previous_logits = None
        if not scheduler.compares_steps:
            previous_logits = None
    if scheduler.undecided(tokens, allowed).any() and not (interrupted is not None and interrupted()):
        raise ValueError("`callback` masked tokens again after the last step, where no step is left to decode them.")
    num = scheduler.config.num_candidates if scheduler.looks_ahead else 1
    return DecodingOutput(tokens, recorder.trace(len(tokens), tokens.shape[1], num), seeds)


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
) -> DecodingOutput:
    """Info-Gain beam search: keeps the B states with the smallest cost so far plus remaining uncertainty.

    Every beam (z, g), g = 0 at first, is expanded by N candidates to g' = g + C(a | z) and f = g' + w · 𝓗(z'); the `num_beams`
    smallest f of all beams go on, equal states once. At the end the smallest g is returned. One beam is `decode`, draw for
    draw. Arguments as in `decode`; the trace is the returned path's, its `model_rows` are those of all beams.

    Raises:
        ValueError: If the sampler is not "info_gain" with at least two candidates, or `num_beams` < 1.
    """
    scheduler = _checked(
        tokens,
        scheduler,
        num_inference_steps,
        lookahead_batch_size,
        grid,
        allowed,
        denoise=denoise,
        interrupted=interrupted,
    )
    if not scheduler.looks_ahead or scheduler.config.sampler != "info_gain":
        raise ValueError(
            f"`scheduler` must use the sampler 'info_gain' with at least 2 candidates for a beam search, got "
            f"{scheduler.config.sampler!r} with {scheduler.config.num_candidates}."
        )
    check_integer("num_beams", num_beams, 1)
    seeds, generators = _own_generators(generator, len(tokens))
    (batch, length), device, num = tokens.shape, tokens.device, scheduler.config.num_candidates
    # Beams are rows of one batch, sample after sample. Rows beyond a sample's living beams are copies that never win (g = inf).
    samples = torch.arange(batch, device=device)
    states = tokens[:, None].expand(batch, num_beams, length)
    cost = torch.full((batch, num_beams), torch.inf, dtype=torch.double, device=device)
    cost[:, 0] = 0
    history: list[dict[str, torch.Tensor]] = []
    weight, reduction = scheduler.config.gain_weight, scheduler.config.gain_reduction
    beam_allowed = None if allowed is None else allowed[:, None].expand(states.shape)
    initial_masks = scheduler.undecided(states, beam_allowed).sum(-1)
    mask_token_id = scheduler.config.mask_token_id
    halton_offsets = scheduler.draw_halton_offsets(generators, length)
    logits: Logits | None = None
    previous_logits: Logits | None = None
    for timestep in scheduler.timesteps:
        alive = cost.isfinite() & scheduler.undecided(states, beam_allowed).any(-1)
        if not alive.any() or (interrupted is not None and interrupted()):
            break
        rows = alive.flatten()
        owners = samples[:, None].expand(batch, num_beams).flatten()[rows]
        model_rows = torch.zeros_like(samples)
        if logits is None:
            every_row = torch.ones_like(owners, dtype=torch.bool)
            logits = _forward(denoise, mask_token_id, states[alive], every_row, owners, lookahead_batch_size)
            model_rows.index_add_(0, owners, torch.ones_like(owners))
        proposal = scheduler.propose(
            logits,
            timestep,
            states[alive],
            None if allowed is None else allowed[owners],
            generator=[generators[owner] for owner in owners.tolist()],
            previous_logits=previous_logits,
            initial_masks=initial_masks[alive],
            grid=grid,
            halton_offsets=None if halton_offsets is None else halton_offsets[owners.cpu()],
        )
        # f = g + C + w · 𝓗(z') = g + w · 𝓗(z) - J, in double precision: one beam then decides as argmax J does, to the last bit.
        # With "kl" 𝓗(z) less the gain is what z' is expected to leave.
        looks = proposal.needs_lookahead
        uncertainty = scoring.state_uncertainty(proposal.entropies, proposal.masked, reduction)
        base = cost[alive] + (weight * uncertainty.double() if looks else 0)
        finished = cost.isfinite() & ~alive
        every = states[:, :, None].expand(batch, num_beams, num, length).flatten(1, 2).clone()
        every[alive[:, :, None].expand(batch, num_beams, num).flatten(1)] = proposal.candidates.flatten(0, 1)
        equal = (every[:, :, None] == every[:, None]).all(-1)
        rank = partial(_rank, base=base, alive=alive, finished=torch.where(finished, cost, torch.inf), equal=equal)
        if looks:
            among_best = partial(_among_best, rank=rank, alive=alive)
            seen = _look_ahead(denoise, scheduler, timestep, proposal, owners, lookahead_batch_size, among_best)
            model_rows.index_add_(0, owners, proposal.distinct.sum(-1))
            gain, objective = seen.gain, seen.objective
            value = objective.double()
        else:  # all candidates of a beam are one state, or finished ones of equal cost
            gain, objective = scheduler.score(None, proposal)
            value = torch.full_like(objective.double(), -torch.inf)
            value[:, 0] = -proposal.cost[:, 0].double()
        f, place = rank(value)

        def spread(value: torch.Tensor, alive: torch.Tensor = alive) -> torch.Tensor:
            """(R, N, ...) of the living beams to (B, beams · N, ...)."""
            full = value.new_zeros(batch, num_beams, *value.shape[1:])
            full[alive] = value
            return full.flatten(1, 2)

        batch_index = samples[:, None]
        parent = place // num
        states = every[batch_index, place]
        new_cost = cost[batch_index, parent] + spread(proposal.cost).double()[batch_index, place]
        record = {
            "parent": parent,
            "num_decoded": spread(proposal.num_decoded)[batch_index, place],
            "cost": spread(proposal.cost)[batch_index, place],
            "gain": spread(gain)[batch_index, place],
            "objective": spread(objective[:, None].expand(-1, num, -1))[batch_index, place],
            "winner": place % num,
            "selected": spread(proposal.selected)[batch_index, place],
            "model_rows": model_rows,
        }
        cost = torch.where(f.isfinite(), new_cost, torch.inf)
        history.append(record)
        living = cost.isfinite() & scheduler.undecided(states, beam_allowed).any(-1)
        row_of = torch.zeros(batch, num_beams, dtype=torch.long, device=device)
        row_of[alive] = torch.arange(len(owners), device=device)
        parent_row = row_of[batch_index, parent][living]
        previous_logits = logits[parent_row] if scheduler.heuristic == "klass" else None
        logits = None
        if looks:
            logits = seen.logits(parent_row, (place % num)[living])
    best = cost.argmin(1)
    recorder, path = _TraceRecorder(), best
    for record in reversed(history):
        values = {name: value[samples, path] for name, value in record.items() if name not in ("parent", "model_rows")}
        recorder.record(**values, model_rows=record["model_rows"])
        path = record["parent"][samples, path]
    recorder.steps.reverse()
    return DecodingOutput(states[samples, best], recorder.trace(batch, length, num), seeds)


def _rank(
    value: torch.Tensor, base: torch.Tensor, alive: torch.Tensor, finished: torch.Tensor, equal: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest f of each sample, (B, beams), and where among its candidates (B, beams · N) they stand.

    Args:
        value: (R, N), J of the candidates of the R living beams, which are those where `alive` (B, beams) is true.
        base: (R,), f + J of a beam's candidates.
        finished: (B, beams), f of finished beams, inf for others.
        equal: (B, beams · N, beams · N), which candidates are the same state.
    """
    f = torch.full((*alive.shape, value.shape[1]), torch.inf, dtype=torch.double, device=value.device)
    f[..., 0] = finished
    f[alive] = base[:, None] - value
    f, place = _once(f.flatten(1), equal).sort(dim=1, stable=True)
    num_beams = alive.shape[1]
    return f[:, :num_beams], place[:, :num_beams]


def _among_best(
    objective: torch.Tensor,
    known: torch.Tensor,
    rank: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    alive: torch.Tensor,
) -> torch.Tensor:
    """Which candidates (R, N) of the living beams would go on as beams if only the known ones were there."""
    f, place = rank(objective.double().masked_fill(~known, -torch.inf))
    chosen = torch.zeros(len(alive), alive.shape[1] * objective.shape[1], dtype=torch.bool, device=f.device)
    return chosen.scatter(1, place, f.isfinite()).view(*alive.shape, -1)[alive]


def _once(f: torch.Tensor, equal: torch.Tensor) -> torch.Tensor:
    """f (B, K) with inf for every state that another one equals (B, K, K) with a smaller f, or with the same f and earlier."""
    place = torch.arange(f.shape[1], device=f.device)
    better = (f[:, None] < f[:, :, None]) | ((f[:, None] == f[:, :, None]) & (place < place[:, None]))
    return f.masked_fill((equal & better).any(-1), torch.inf)


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
) -> DecodingOutput:
    """Best-of-N: decodes every sample `num_runs` times and returns the run with the smallest cumulative entropy.

    Arguments as in `decode`; the trace is the returned run's, its `model_rows` are those of all runs together. Runs within 1e-4
    nats of the smallest count as equal, so that rounding decides nothing; the first of them is taken.
    """
    _checked(
        tokens,
        scheduler,
        num_inference_steps,
        lookahead_batch_size,
        grid,
        allowed,
        denoise=denoise,
        interrupted=interrupted,
    )
    check_integer("num_runs", num_runs, 1)
    batch = len(tokens)
    seeds, own = _own_generators(generator, batch)
    generators = [child for one in own for child in split_generator(one, num_runs)]
    output = decode(
        lambda states, rows: denoise(states, rows // num_runs),
        scheduler,
        tokens.repeat_interleave(num_runs, 0),
        allowed=None if allowed is None else allowed.repeat_interleave(num_runs, 0),
        generator=generators,
        lookahead_batch_size=lookahead_batch_size,
        grid=grid,
        num_inference_steps=num_inference_steps,
        interrupted=interrupted,
    )
    entropies = output.trace.cumulative_entropy.view(batch, num_runs)
    run = (entropies <= entropies.amin(1, keepdim=True) + 1e-4).int().argmax(1)
    best = torch.arange(batch) * num_runs + run
    trace = output.trace.take(best)
    trace.model_rows = output.trace.model_rows.view(-1, batch, num_runs).sum(-1)
    return DecodingOutput(output.tokens[best.to(tokens.device)], trace, seeds)


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

    Raises:
        torch.OutOfMemoryError: If memory runs out, naming the argument that lowers it.
    """
    try:
        if num_beams > 1:
            return decode_beam(denoise, scheduler, tokens, num_beams=num_beams, **options)
        if num_runs > 1:
            return decode_best_of(denoise, scheduler, tokens, num_runs=num_runs, **options)
        return decode(denoise, scheduler, tokens, callback=callback, **options)
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
