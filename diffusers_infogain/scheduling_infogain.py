"""The scheduler: proposes actions, and selects one of them by what it leaves uncertain."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# The name must stand in this module: diffusers finds out how to load a component by looking for it here.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from . import candidates as draw
from . import schedules, scoring
from .checks import check_bool, check_choice, check_integer, check_number, check_tensor, check_type, is_number
from .choices import CERTAINTIES, LOOKAHEAD_SAMPLERS, PARALLEL_SAMPLERS, SAMPLERS
from .masked_logits import Logits, MaskedLogits
from .printing import shown, summary

DEFAULT_ENTROPY_BOUNDS = {"info_gain": 0.5, "lookum": 0.5, "entropy_bound": 0.1}
DEFAULT_PARALLEL_THRESHOLD = 0.9
MOST_STEPS = 10**6
"""Of a run: each step decodes a token at least, and no canvas has that many."""
COLDEST = 1e-6
"""The lowest temperature above 0: logits divided by less overflow in float32, and the most probable token is all that is left."""
_SCORED_AT_ONCE = 1 << 22
"""Logits that are scored together: float32 copies of more are never made at once."""


@dataclass
class InfoGainProposal(BaseOutput):
    """N candidate actions per sample, as the states they lead to. L = H · W for images.

    Attributes:
        candidates: (B, N, L) long, z_{t-1} for every action.
        selected: (B, N, L) bool, A: the positions that the action decodes.
        cost: (B, N) float32, C(a | z_t) in nats.
        needs_lookahead: Whether `select` needs logits of the candidates: not when all candidates of every sample coincide, not
            when they decode the last masks, and never for a greedy sampler.
        masked: (B, L) bool, M_t: masked positions that may be decoded.
        entropies: (B, L) float32, H_l(z_t) in nats on M_t, 0 elsewhere.
        duplicate_of: (B, N) long, the first candidate with the same state; only that one's logits are read.
        logits: (B, L, V) of z_t, where the gain compares distributions ("kl"), else None.
        settled: (B, L) long, for "klass_parallel": in how many steps on end, this one included, the position's distribution has
            hardly changed; the next step's `propose` takes it. None for other samplers.
    """

    candidates: torch.Tensor
    selected: torch.Tensor
    cost: torch.Tensor
    needs_lookahead: bool
    masked: torch.Tensor
    entropies: torch.Tensor
    duplicate_of: torch.Tensor
    logits: Logits | None = None
    settled: torch.Tensor | None = None

    def __repr__(self) -> str:
        return summary(self)

    @property
    def num_decoded(self) -> torch.Tensor:
        """(B, N) long, k_t of every action."""
        return self.selected.sum(-1)

    @property
    def next_masked(self) -> torch.Tensor:
        """(B, N, L) bool, M_{t-1} for every action."""
        return self.masked[:, None] & ~self.selected

    @property
    def distinct(self) -> torch.Tensor:
        """(B, N) bool: the candidates whose logits `select` reads, one of every group of equal ones with masks left."""
        first = self.duplicate_of == torch.arange(self.duplicate_of.shape[1], device=self.duplicate_of.device)
        return first & self.next_masked.any(-1)

    def commit(
        self, winner: torch.Tensor, gain: torch.Tensor, objective: torch.Tensor, pred_logits: Logits | None = None
    ) -> InfoGainSchedulerOutput:
        """The step that takes the candidates `winner` (B,)."""
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
        pred_logits: (B, L, V), the lookahead logits of `prev_sample`, to go on from; None without a lookahead.
        cost: (B, N) float32, C(a | z_t) in nats.
        gain: (B, N) float32, IG(a; z_t) in nats; NaN where it is unknown for want of a lookahead.
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


def _check_temperature(name: str, value: Any, positive: bool = False) -> tuple[float, float]:
    """A temperature, or a pair (start, end) of them, as a pair.

    Args:
        positive: Whether the ends of a pair must be above 0.

    Raises:
        ValueError: If it is neither, or out of range.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    ends_at_zero = positive and isinstance(value, (tuple, list)) and not all(is_number(one) and one > 0 for one in pair)
    if len(pair) != 2 or ends_at_zero:
        above = " of numbers > 0" if positive else ""
        raise ValueError(f"`{name}` must be a number or a pair (start, end){above}, got {shown(value)}.")
    for one in pair:
        check_number(name, one, 0)
        if 0 < one < COLDEST:
            raise ValueError(f"`{name}` must be 0 or at least {COLDEST:g}, got {shown(value)}.")
    return pair


def _check_device(device: Any) -> None:
    """Raises a ValueError if it is no device that torch can use here, and not None."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # torch's own differ by the device
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ValueError(f"`device` must be a device that torch can use here, or None, got {shown(device)}: {reason}") from None


def _token_surprisals(path: str | None) -> torch.Tensor:
    """-log f (V,) of the reference frequencies f in a file; a token that never occurs counts as the rarest one that does."""
    if path is None:
        raise ValueError(
            "`pc_frequencies` must be the path of a file with token frequencies for the rule 'pc_sampler', got None: build one "
            "with `token_frequencies` and `save_token_frequencies` of diffusers_infogain.token_frequencies."
        )
    return _read_surprisals(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=4)  # every call of a pipeline asks for them
def _read_surprisals(path: str, modified: int) -> torch.Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        frequencies = load_file(path).get("frequencies")
    except SafetensorError as error:
        raise ValueError(f"`pc_frequencies` must be the path of a safetensors file, got {path!r}: {error}.") from error
    if frequencies is None or frequencies.ndim != 1 or frequencies.dtype != torch.float32:
        got = "none" if frequencies is None else f"{frequencies.dtype} {tuple(frequencies.shape)}"
        raise ValueError(f'`pc_frequencies` must hold a float32 tensor "frequencies" of shape (V,), got {got} in {path!r}.')
    if not ((frequencies >= 0) & (frequencies <= 1)).all() or not frequencies.any():
        raise ValueError(f"`pc_frequencies` must hold numbers in [0, 1], not all of them 0, got others in {path!r}.")
    return -frequencies.clamp(min=frequencies[frequencies > 0].min()).log()


def _check_logits(name: str, logits: Any, ndims: Sequence[int] = range(8)) -> None:
    """Raises a ValueError that names the argument if these are no logits."""
    if not isinstance(logits, MaskedLogits):
        check_tensor(name, logits, ndims, "a tensor of real numbers with the tokens in the codebook as its last dimension")


class InfoGainScheduler(SchedulerMixin, ConfigMixin):
    r"""Decides which masked tokens to decode next, and with what, for masked (discrete) diffusion models.

    Info-gain sampling (arXiv 2602.18176) proposes N actions, looks at the model's logits after each, and commits the one with
    the largest \(J(a) = w \cdot IG(a; z_t) - C(a | z_t)\): what it takes away from the uncertainty of the tokens still masked,
    less the entropy of the tokens it decodes. The greedy rules it is compared with are proposals with one candidate, so one
    loop and one stream of random numbers serve all:

    ```python
    scheduler.set_timesteps(num_inference_steps)
    logits = denoise(tokens)                                         # (B, L, V)
    for t in scheduler.timesteps:                                    # descending
        proposal = scheduler.propose(logits, t, tokens, generator=generator)
        lookahead = denoise(proposal.candidates) if proposal.needs_lookahead else None      # (B, N, L, V)
        output = scheduler.select(lookahead, t, proposal)
        tokens, logits = output.prev_sample, output.pred_logits
        if logits is None:
            logits = denoise(tokens)
    ```

    `diffusers_infogain.decoding.decode` is this loop with chunked lookahead, finished samples left out and a trace. `step` has
    the contract of every diffusers scheduler, so the greedy rules also run in the stock `AmusedPipeline`.

    Args:
        mask_token_id: The id that marks a masked token. It is never sampled.
        masking_schedule: "cosine", "linear", "arccos" or "even": how the number of masked tokens falls over the steps. "even" is
            linear with counts that differ by one at most, the larger first, as published for text.
        tokens_per_step: Decode this many tokens a step instead of following `masking_schedule`.
        sampler: The rule. "info_gain" and "lookum" (smallest remaining uncertainty, whatever the cost) look ahead. The greedy
            rules decode the positions with the largest score φ: "confidence" (largest probability), "maskgit" (log-probability
            of the sampled token plus annealed Gumbel noise, as MaskGIT and aMUSEd do), "entropy" (-H), "margin" (lead of the
            most probable token), "uniform" (random), "halton" (a low-discrepancy order over the image grid), "klass"
            (confidence, positions whose distribution has settled first), "pivot" (the most uncertain position, together with
            the most certain ones), "pc_sampler" (probability of the sampled token, times how rare the token is in text, earlier
            positions first); "entropy_bound" decodes, in order of entropy, as many as its bound allows. Two more go ahead of
            the schedule: "confidence_parallel" decodes every position with a probability above `confidence_threshold`
            (Fast-dLLM's rule), "klass_parallel" those of them that have settled for `klass_history` steps (KLASS as published).
        certainty: The φ by which "info_gain" and "lookum" propose positions; any greedy rule but "entropy_bound" and the two
            parallel ones.
        num_candidates: N, the actions proposed per step by "info_gain" and "lookum". 1 makes them greedy by `certainty`.
        token_temperature: τ_token, tokens are drawn from softmax(logits / τ_token); 0 takes the most probable one. A pair
            (start, end) of temperatures above 0 is annealed so that the factor on the logits, 1 / τ_token, is linear.
        position_temperature: τ_pos. Candidates after the first draw positions in proportion to exp(φ / τ_pos), without
            replacement; for "maskgit" it multiplies the Gumbel noise of every candidate. A pair (start, end) is annealed
            linearly over the steps (or, where `entropy_bound` runs ahead of them, over the share of tokens decoded). 0 switches
            the noise off, so candidates differ in tokens only. For "pivot" it is in nats, and draws the pivot in proportion to
            exp(H / τ_pos).
            None: (2, 0) for "maskgit", as published, 1 for "pivot", and 0.4 otherwise.
        top_k, top_p: Draw tokens from the `top_k` most probable, or from the smallest set that holds the mass `top_p`. Scores
            are always taken on the whole distribution.
        confidence_threshold: γ. Positions with a probability above it (at most k_t, the most confident) are in every candidate,
            with their most probable token; a step that they fill needs no lookahead. For "confidence_parallel" and
            "klass_parallel" it is the rule's own threshold instead (None: 0.9): all positions above it, however many, with their
            drawn tokens (`token_temperature` 0: the most probable); where the schedule asks for more, the most confident of the
            others come with them, so the schedule is the slowest pace and one token a step gives the published rules.
        gain_weight: w >= 0.
        gain_reduction: "mean" over the masked positions, as in the paper, or "sum", which has the scale of the cost; with
            w = 1 J is then the realised fall of entropy at the positions not decoded. "kl" takes KL(after ‖ before) there in
            place of the fall of entropy: the same on average, without its pull to what is predictable ("lookum" and beams, which
            need an uncertainty, take the sum then).
        entropy_bound: In nats. Where the schedule asks for fewer, decode as many positions, in the order of φ, as keep the sum
            of their entropies without the largest at or below this; the canvas is then finished early, and the schedule is the
            slowest pace. 0 switches it off. The sampler "entropy_bound" follows its bound alone. None: 0.5 for "info_gain" and
            "lookum", 0.1 for "entropy_bound", off for the other rules.
        klass_threshold: For "klass" and "klass_parallel", in nats: a position has settled when KL(now ‖ previous step) is below
            this.
        klass_history: For "klass_parallel": in how many steps on end a position must have settled, the present one included. In
            `step`, which knows of no step before, none ever has.
        halton_randomize: For "halton": every sample starts at its own random place of the order and goes round, as published. In
            `step`, which knows of no sample's beginning, all start at the first.
        pc_frequencies: For "pc_sampler": path of a safetensors file with one float32 tensor "frequencies" (V,), how often each
            token occurs in reference text (`token_frequencies.save_token_frequencies` writes it). It is read by the first
            `set_timesteps`; numbers beyond the logits' V are not used. Tokens of frequency 0 count as the rarest that occurs.
        pc_decay: λ of "pc_sampler", whose φ falls by exp(-λ) from one position of the active region to the next.
        pc_clip: α of "pc_sampler", the most that the calibrated confidence counts.

    Raises:
        ValueError: For a value outside these ranges, naming it and what is allowed.
    """

    order = 1
    _compatibles = ["AmusedScheduler"]  # whose configurations `from_config` takes

    timesteps: torch.Tensor
    position_temperatures: torch.Tensor
    _surprisals: torch.Tensor

    @register_to_config
    def __init__(
        self,
        mask_token_id: int,
        masking_schedule: str = "cosine",
        tokens_per_step: int | None = None,
        sampler: str = "info_gain",
        certainty: str = "maskgit",
        num_candidates: int = 4,
        token_temperature: float | tuple[float, float] = 1.0,
        position_temperature: float | tuple[float, float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        confidence_threshold: float | None = None,
        gain_weight: float = 1.0,
        gain_reduction: str = "kl",
        entropy_bound: float | None = None,
        klass_threshold: float = 5e-4,
        halton_randomize: bool = False,
        klass_history: int = 2,
        pc_frequencies: str | None = None,
        pc_decay: float = 0.25,
        pc_clip: float = 10.0,
    ):
        check_integer("mask_token_id", mask_token_id, 0)
        check_choice("masking_schedule", masking_schedule, schedules.MASKING_SCHEDULES)
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("certainty", certainty, CERTAINTIES)
        check_choice("gain_reduction", gain_reduction, scoring.GAIN_REDUCTIONS)
        check_integer("num_candidates", num_candidates, 1)
        check_integer("klass_history", klass_history, 1)
        check_integer("tokens_per_step", tokens_per_step, 1, optional=True)
        check_integer("top_k", top_k, 1, optional=True)
        _check_temperature("token_temperature", token_temperature, positive=True)
        if position_temperature is not None:
            _check_temperature("position_temperature", position_temperature)
        check_bool("halton_randomize", halton_randomize)
        numbers = {"gain_weight": gain_weight, "klass_threshold": klass_threshold, "pc_decay": pc_decay, "pc_clip": pc_clip}
        for name, number in numbers.items():
            check_number(name, number, 0)
        check_number("entropy_bound", entropy_bound, 0, optional=True)
        if sampler == "entropy_bound" and entropy_bound == 0:
            raise ValueError("`entropy_bound` must be above 0, or None, for the sampler 'entropy_bound', got 0.")
        if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"`top_p` must be a number in (0, 1], got {shown(top_p)}.")
        check_number("confidence_threshold", confidence_threshold, 0, 1, optional=True)
        check_type("pc_frequencies", pc_frequencies, (str, type(None)), "the path of a file, as a string, or None")
        self.timesteps = None  # type: ignore[assignment]  # until `set_timesteps`
        self.position_temperatures = None  # type: ignore[assignment]
        self._surprisals = None  # type: ignore[assignment]  # for "pc_sampler" only

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **settings: Any) -> Any:
        """A scheduler with the settings of a configuration, its own or an `AmusedScheduler`'s, and others in their place.

        Args:
            config: Such as `pipe.scheduler.config`. What another scheduler's has besides is kept and not used.
            return_unused_kwargs: Whether to return (scheduler, what was not used), as `ConfigMixin.from_config` does.
            settings: As in the constructor.

        Raises:
            TypeError: For a setting that does not exist, naming the closest one (not with `return_unused_kwargs`).
            ValueError: As the constructor.
        """
        check_type("config", config, (Mapping, type(None)), "the configuration of a scheduler, a mapping, or None")
        check_bool("return_unused_kwargs", return_unused_kwargs)
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        unknown = [name for name in settings if name not in (*known, "pretrained_model_name_or_path")]
        if unknown and not return_unused_kwargs:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"the closest is {close[0]!r}" if close else f"there are {', '.join(known)}"
            raise TypeError(f"{cls.__name__} has no setting {unknown[0]!r}; {hint}.")
        if config is not None:
            # diffusers lists there what was not given by keyword, and drops it: positional arguments as well.
            config = {name: value for name, value in config.items() if name != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **settings)

    @property
    def looks_ahead(self) -> bool:
        """Whether the sampler compares candidates by a lookahead."""
        return self.config.sampler in LOOKAHEAD_SAMPLERS and self.config.num_candidates > 1

    @property
    def entropy_bound(self) -> float:
        """The bound in use, in nats; 0 for none."""
        if self.config.entropy_bound is not None:
            return self.config.entropy_bound
        return DEFAULT_ENTROPY_BOUNDS.get(self.config.sampler, 0.0)

    @property
    def heuristic(self) -> str:
        """The φ in use: `certainty` for a lookahead sampler, else the sampler's own."""
        if self.config.sampler in LOOKAHEAD_SAMPLERS:
            return self.config.certainty
        if self.config.sampler in PARALLEL_SAMPLERS:
            return "confidence"
        return "entropy" if self.config.sampler == "entropy_bound" else self.config.sampler

    @property
    def compares_steps(self) -> bool:
        """Whether the rule reads the logits of the step before."""
        return self.heuristic == "klass" or self.config.sampler == "klass_parallel"

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | Sequence[float] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Lays out the steps: `timesteps` runs from `num_inference_steps` - 1 down to 0.

        Args:
            temperature: Replaces `position_temperature` for this run (the place where `AmusedPipeline` passes its own).

        Raises:
            ValueError: For numbers outside these ranges, or for "pc_sampler" without usable `pc_frequencies`.
        """
        check_integer("num_inference_steps", num_inference_steps, 1, MOST_STEPS)
        if self.heuristic == "pc_sampler" and self._surprisals is None:
            self._surprisals = _token_surprisals(self.config.pc_frequencies)
        if temperature is None:
            temperature = self.config.position_temperature
        if temperature is None:
            temperature = (2.0, 0.0) if self.heuristic == "maskgit" else 1.0 if self.heuristic == "pivot" else 0.4
        start, end = _check_temperature("position_temperature", temperature)
        _check_device(device)
        self.timesteps = torch.arange(num_inference_steps, device=device).flip(0)
        self.position_temperatures = torch.linspace(start, end, num_inference_steps, dtype=torch.float32)

    def with_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> InfoGainScheduler:
        """A copy that has its steps laid out, while this scheduler stays as it is: for runs beside each other, as in threads.

        Raises:
            ValueError: As `set_timesteps`.
        """
        own = copy.copy(self)
        own.set_timesteps(num_inference_steps, device=device)
        return own

    def timesteps_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """The timestep (R,) of states (R, L) by their masks: when the schedule leaves so many of an empty canvas of L.

        A model that is told the time is told this one, also about a state that is only looked at, or that an entropy bound
        brought ahead of the schedule.
        """
        config, steps = self.config, len(self.timesteps)
        planned = schedules.planned_masks(tokens.shape[1], steps, config.masking_schedule, tokens_per_step=config.tokens_per_step)
        masks = (tokens == config.mask_token_id).sum(-1)
        return steps - (planned.to(tokens.device) >= masks[:, None]).sum(-1)

    def _token_temperature(self, index: int) -> float:
        temperature = self.config.token_temperature
        if not isinstance(temperature, (tuple, list)):
            return temperature
        start, end = 1 / temperature[0], 1 / temperature[1]
        return 1 / (start + (end - start) * index / max(len(self.timesteps) - 1, 1))

    def draw_halton_offsets(self, generators: Sequence[torch.Generator], length: int) -> torch.Tensor | None:
        """Where in the Halton order each sample starts, (B,) long, for `propose`; None where the settings draw no such place."""
        if self.heuristic != "halton" or not self.config.halton_randomize:
            return None
        return torch.cat([torch.randint(length, (1,), generator=one, device=one.device).cpu() for one in generators])

    def undecided(self, tokens: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
        """M_t: the masked positions of `tokens` that may be decoded, a mask of the same shape.

        Raises:
            ValueError: If `allowed` is not a bool tensor of that shape.
        """
        masked = tokens == self.config.mask_token_id
        if allowed is None:
            return masked
        if not isinstance(allowed, torch.Tensor) or allowed.shape != tokens.shape or allowed.dtype != torch.bool:
            raise ValueError(f"`allowed` must be bool of shape {tuple(tokens.shape)}, got {shown(allowed)}.")
        return masked & allowed

    def _step_index(self, timestep: int | torch.Tensor) -> int:
        if self.timesteps is None:
            raise ValueError("`timesteps` are not set: call `set_timesteps` first.")
        number = timestep.item() if isinstance(timestep, torch.Tensor) and timestep.numel() == 1 else timestep
        num_steps = len(self.timesteps)
        if not (is_number(number) and 0 <= number < num_steps and number == int(number)):
            raise ValueError(f"`timestep` must be one of the scheduler's {num_steps} timesteps, got {shown(number)}.")
        return num_steps - 1 - int(number)

    def _codebook_logits(self, logits: Logits, masked: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """The logits (..., L, V) at the positions of `masked`, as (M, V) in float32, without the mask token."""
        return self._codebook_rows(logits[masked], masked.nonzero(as_tuple=True), timestep)

    def _codebook_rows(self, rows: torch.Tensor, places: tuple[torch.Tensor, ...], timestep: int | torch.Tensor) -> torch.Tensor:
        """Logits (M, V), which are changed, in float32 and without the mask token; `places` (sample, perhaps candidate, position)
        are named in an error."""
        rows = rows.float()
        mask_token_id = self.config.mask_token_id
        if mask_token_id < rows.shape[-1]:
            rows[:, mask_token_id] = -torch.inf
        largest = rows.amax(-1)
        if not largest.isfinite().all():
            where = [int(index[~largest.isfinite()][0]) for index in places]
            place = f"sample {where[0]}, " + (f"candidate {where[1]}, " if len(where) == 3 else "") + f"position {where[-1]}"
            raise ValueError(
                f"`logits` are NaN, +inf or all -inf at step {self._step_index(timestep)}, {place}: the model's output cannot "
                "be sampled from (half precision may have overflowed; -inf for single tokens is allowed)."
            )
        return rows

    def propose(
        self,
        logits: Logits,
        timestep: int | torch.Tensor,
        tokens: torch.Tensor,
        allowed: torch.Tensor | None = None,
        *,
        generator: draw.Generators = None,
        previous_logits: Logits | None = None,
        initial_masks: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
        halton_offsets: torch.Tensor | None = None,
        settled: torch.Tensor | None = None,
    ) -> InfoGainProposal:
        """Draws the candidate actions of a step. Changes neither its arguments nor the scheduler.

        Args:
            logits: (B, L, V) of `tokens`, after guidance, on the tokens that may be sampled. Logits at masked positions suffice
                (`MaskedLogits`).
            timestep: One of `timesteps`.
            tokens: (B, L) long, z_t.
            allowed: (B, L) bool, positions that may be decoded now, such as the active block; by default all.
            generator: One generator, drawn from sample after sample, or a list with one per sample.
            previous_logits: (B, L, V) of the step before, for "klass" and "klass_parallel".
            initial_masks: (B,) masked positions before the first step. Without it the schedule goes by what is left, which is
                exact for canvases that were masked completely, and nearly so otherwise.
            grid: (height, width) of the tokens, for "halton"; by default a square.
            halton_offsets: (B,) from `draw_halton_offsets`, the same in all steps; by default 0.
            settled: (B, L) long, for "klass_parallel": `settled` of the proposal before; by default 0.

        Raises:
            ValueError: For shapes that do not fit, an unknown timestep, or logits that are NaN, +inf or -inf for all tokens.
        """
        config, index = self.config, self._step_index(timestep)
        check_tensor("tokens", tokens, range(8), "a long tensor (batch, length)", [torch.long])
        _check_logits("logits", logits)
        if tokens.ndim != 2 or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"`logits` must have the shape (batch, length, tokens in the codebook) of `tokens` (batch, length), "
                f"got {tuple(logits.shape)} for {tuple(tokens.shape)}."
            )
        (batch, length), device = tokens.shape, tokens.device
        for name, one in (("initial_masks", initial_masks), ("halton_offsets", halton_offsets)):
            if one is not None:
                check_tensor(name, one, [1], f"a tensor of {batch} integers or None", [torch.long])
        if previous_logits is not None:
            _check_logits("previous_logits", previous_logits, [3])
        if settled is not None:
            check_tensor("settled", settled, [2], "a long tensor (batch, length) or None", [torch.long])
        masked = self.undecided(tokens, allowed)
        rows = self._codebook_logits(logits, masked, timestep)
        entropies = torch.zeros(batch, length, dtype=torch.float32, device=device)
        entropies[masked] = scoring.entropy(rows)

        num = config.num_candidates if self.looks_ahead else 1
        uniform = draw.draw_uniforms(generator, batch, num, length).to(device)
        row_uniform = uniform.permute(0, 3, 1, 2)[masked]  # (M, N, 2)
        row_tokens = draw.sample_tokens(rows, row_uniform[..., 0], self._token_temperature(index), config.top_k, config.top_p)
        values = torch.zeros(batch, length, num, dtype=torch.long, device=device)
        values[masked] = row_tokens
        values = values.transpose(1, 2)

        num_masked = masked.sum(-1)
        max_masks = torch.full_like(num_masked, length) if allowed is None else allowed.sum(-1)
        share = num_masked.float() / (max_masks if initial_masks is None else initial_masks).clamp(min=1)
        temperature = self._temperatures(index, share)
        previous = None
        if previous_logits is not None and self.compares_steps:
            previous = self._codebook_logits(previous_logits, masked, timestep)
        phi = torch.full((batch, length, num), -torch.inf, dtype=torch.float32, device=device)
        if self.heuristic == "pivot":
            phi[masked] = self._pivot_scores(entropies, masked, uniform[:, :, 1], temperature).transpose(1, 2)[masked]
        else:
            row_temperature = temperature[:, None].expand(batch, length)[masked][:, None]
            if self.heuristic == "halton":
                rank = self._halton_rank(length, grid).to(device).expand(batch, length)
                if halton_offsets is not None:
                    rank = (rank + halton_offsets.to(device)[:, None]) % length
                row_phi = -rank[masked].float()
            elif self.heuristic == "pc_sampler":
                place = (torch.ones_like(masked) if allowed is None else allowed).cumsum(-1)[masked] - 1
                row_phi = self._calibrated_confidence(rows, row_tokens, place)
            else:
                row_phi = self._row_scores(rows, entropies[masked], row_tokens, row_uniform[..., 1], row_temperature, previous)
            # "maskgit" has noise of its own, and "uniform" is nothing else.
            draws = self.heuristic not in ("maskgit", "uniform")
            phi[masked] = self._perturb(row_phi, row_uniform[..., 1], row_temperature) if draws else row_phi
        phi = phi.transpose(1, 2)

        count = schedules.decode_counts(
            num_masked,
            index,
            len(self.timesteps),
            config.masking_schedule,
            tokens_per_step=config.tokens_per_step,
            initial_masks=initial_masks,
            max_masks=max_masks,
        )
        next_settled = None
        if config.sampler in PARALLEL_SAMPLERS:
            ready = phi[:, 0] > (
                DEFAULT_PARALLEL_THRESHOLD if config.confidence_threshold is None else config.confidence_threshold
            )
            if config.sampler == "klass_parallel":
                next_settled = self._settled(rows, previous, masked, settled)
                ready &= next_settled >= config.klass_history
            phi = torch.where(ready[:, None], torch.inf, phi)
            count = torch.maximum(count, ready.sum(-1))
        elif config.confidence_threshold is not None:
            confidence = torch.zeros(batch, length, dtype=torch.float32, device=device)
            confidence[masked] = scoring.top_probability(rows)
            above = (confidence > config.confidence_threshold).sum(-1)
            bypass = draw.select_top(confidence[:, None], torch.minimum(above, count))
            best = torch.zeros(batch, length, dtype=torch.long, device=device)
            best[masked] = rows.argmax(-1)
            phi = torch.where(bypass, torch.inf, phi)
            values = torch.where(bypass, best[:, None], values)
        # In memory order, so that the costs of equal candidates are sums in the same order and equal to the last bit.
        selected = self._select(phi.contiguous(), entropies, count, last=index == len(self.timesteps) - 1)
        candidates = torch.where(selected, values, tokens[:, None])
        proposal = InfoGainProposal(
            candidates=candidates,
            selected=selected,
            cost=scoring.action_cost(entropies[:, None], selected),
            needs_lookahead=False,
            masked=masked,
            entropies=entropies,
            duplicate_of=draw.first_occurrence(candidates),
            logits=logits if self.looks_ahead and config.sampler == "info_gain" and config.gain_reduction == "kl" else None,
            settled=next_settled,
        )
        differ = (proposal.duplicate_of > 0).any(-1) & proposal.next_masked.flatten(1).any(-1)
        proposal.needs_lookahead = self.looks_ahead and bool(differ.any())
        return proposal

    def _temperatures(self, index: int, share: torch.Tensor) -> torch.Tensor:
        """τ_pos per sample, of whose masks the `share` (B,) is left: annealed over the steps, or, where an entropy bound lets a
        sample run ahead of them, over its tokens."""
        by_step = self.position_temperatures[index].to(share.device).expand(share.shape)
        if self.entropy_bound == 0:
            return by_step
        start, end = self.position_temperatures[[0, -1]].tolist()
        by_token = end + (start - end) * share
        return by_token.minimum(by_step) if end <= start else by_token.maximum(by_step)

    def _select(self, phi: torch.Tensor, entropies: torch.Tensor, count: torch.Tensor, last: bool) -> torch.Tensor:
        """A (B, N, L): the `count` (B,) best of φ (B, N, L), or as many more as the entropy bound allows."""
        bound = self.entropy_bound
        if self.config.sampler == "entropy_bound" and not last:
            return draw.select_within_bound(phi, entropies, bound) | (phi == torch.inf)
        selected = draw.select_top(phi, count)
        return selected if bound == 0 else selected | draw.select_within_bound(phi, entropies, bound)

    def _settled(
        self, rows: torch.Tensor, previous: torch.Tensor | None, masked: torch.Tensor, settled: torch.Tensor | None
    ) -> torch.Tensor:
        """In how many steps on end (B, L) a position has been within `klass_threshold` of the step before; 0 in the first."""
        steps = torch.zeros(masked.shape, dtype=torch.long, device=masked.device)
        if previous is not None:
            before = steps if settled is None else settled
            close = scoring.kl_divergence(rows, previous) < self.config.klass_threshold
            steps[masked] = torch.where(close, before[masked] + 1, 0)
        return steps

    @staticmethod
    def _pivot_scores(
        entropies: torch.Tensor, masked: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor
    ) -> torch.Tensor:
        """φ (B, N, L): -H, but 1, and so first, at the pivot, the largest H + τ_pos · Gumbel noise (candidate 0: no noise)."""
        noise = temperature[:, None, None] * draw.gumbel(uniform)
        noise[:, 0] = 0
        pivot = (entropies[:, None] + noise).masked_fill(~masked[:, None], -torch.inf).argmax(-1, keepdim=True)
        return (-entropies[:, None].expand(noise.shape)).scatter(-1, pivot, 1.0)

    def _row_scores(
        self,
        rows: torch.Tensor,
        entropies: torch.Tensor,
        tokens: torch.Tensor,
        uniform: torch.Tensor,
        temperature: torch.Tensor,
        previous: torch.Tensor | None,
    ) -> torch.Tensor:
        """φ at M positions, (M,) or, for the rules that draw, (M, N); higher is earlier."""
        if self.heuristic == "maskgit":
            return rows.log_softmax(-1).gather(-1, tokens) + temperature * draw.gumbel(uniform)
        if self.heuristic == "uniform":
            return uniform
        if self.heuristic == "entropy":
            return -entropies
        if self.heuristic == "margin":
            return scoring.margin(rows)
        phi = scoring.top_probability(rows)
        if previous is not None and self.heuristic == "klass":
            phi = phi + (scoring.kl_divergence(rows, previous) < self.config.klass_threshold)
        return phi

    def _calibrated_confidence(self, rows: torch.Tensor, tokens: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """φ (M, N) of "pc_sampler" for the drawn `tokens` (M, N) at positions that are the `place`-th (M,) of those allowed."""
        if len(self._surprisals) < rows.shape[-1]:
            raise ValueError(
                f"`pc_frequencies` must hold a number for each of the model's {rows.shape[-1]} tokens, got "
                f"{len(self._surprisals)} in {self.config.pc_frequencies!r}."
            )
        probability = rows.softmax(-1).gather(-1, tokens)
        surprisal = self._surprisals.to(tokens.device)[tokens]
        return scoring.calibrated_confidence(probability, surprisal, place[:, None], self.config.pc_decay, self.config.pc_clip)

    @staticmethod
    def _perturb(phi: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """φ / τ_pos + Gumbel noise (M, N), whose top k are draws without replacement from exp(φ / τ_pos); candidate 0 is φ.

        τ_pos (M, 1) = 0 leaves φ as it is.
        """
        phi = (phi if phi.ndim == uniform.ndim else phi[:, None]).expand(uniform.shape)
        noisy = torch.where(temperature > 0, phi / temperature + draw.gumbel(uniform), phi)
        return torch.cat([phi[:, :1], noisy[:, 1:]], dim=1)

    @staticmethod
    def _halton_rank(length: int, grid: tuple[int, int] | None) -> torch.Tensor:
        height, width = grid or (round(length**0.5), round(length**0.5))
        if height * width != length:
            raise ValueError(f"`grid` must be given as (height, width) with {length} cells for the halton order, got {grid}.")
        return scoring.halton_order(height, width)

    def score_rows(
        self,
        logits: Logits,
        timestep: int | torch.Tensor,
        proposal: InfoGainProposal,
        rows: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """What the gains of some candidates need of their logits, after which these can be dropped.

        Args:
            logits: (K, L, V) of the candidates; only those at masked positions of distinct ones are read.
            rows: Which they are: sample and candidate, (K,) long each.

        Returns:
            (K, L) in nats: at positions still masked the entropy, or with "kl" KL(after ‖ before), and 0 elsewhere.

        Raises:
            ValueError: If a logit is NaN or +inf, or all at a position are -inf.
        """
        samples, columns = rows
        state, position = (proposal.next_masked & proposal.distinct[..., None])[rows].nonzero(as_tuple=True)
        values = torch.zeros(len(samples), proposal.masked.shape[-1], dtype=torch.float32, device=proposal.masked.device)
        size = max(_SCORED_AT_ONCE // logits.shape[-1], 1)
        for here in zip(state.split(size), position.split(size), strict=True):
            sample, at = samples[here[0]], here[1]
            after = self._codebook_rows(logits[here], (sample, columns[here[0]], at), timestep)
            if proposal.logits is None:
                values[here] = scoring.entropy(after)
            else:
                before = self._codebook_rows(proposal.logits[sample, at], (sample, at), timestep)
                values[here] = scoring.kl_divergence(after, before)
        return values

    def score(self, values: torch.Tensor | None, proposal: InfoGainProposal) -> tuple[torch.Tensor, torch.Tensor]:
        """Information gain and objective of every candidate, (B, N) each; NaN where they are unknown for want of a lookahead.

        Args:
            values: (B, N, L), `score_rows` of every distinct candidate; None without a lookahead.
        """
        reduction, next_masked = self.config.gain_reduction, proposal.next_masked
        if values is not None:
            values = values[torch.arange(len(values), device=values.device)[:, None], proposal.duplicate_of]
        else:
            zeros = torch.zeros(next_masked.shape, dtype=torch.float32, device=next_masked.device)
            values = zeros.masked_fill(next_masked, torch.nan)
        if proposal.logits is not None:
            gain = scoring.surprise(proposal.cost, values, next_masked)
            return gain, scoring.objective(gain, proposal.cost, self.config.gain_weight)
        next_uncertainty = scoring.state_uncertainty(values, next_masked, reduction)
        uncertainty = scoring.state_uncertainty(proposal.entropies, proposal.masked, reduction)
        gain = scoring.information_gain(uncertainty, next_uncertainty)
        if self.config.sampler == "lookum":
            return gain, -next_uncertainty
        return gain, scoring.objective(gain, proposal.cost, self.config.gain_weight)

    def select(
        self, lookahead_logits: Logits | None, timestep: int | torch.Tensor, proposal: InfoGainProposal
    ) -> InfoGainSchedulerOutput:
        """Commits the candidate with the largest objective. Changes neither its arguments nor the scheduler.

        Args:
            lookahead_logits: (B, N, L, V), the logits of `proposal.candidates`; of equal candidates only the first one's are
                read (`proposal.distinct`). None where `proposal.needs_lookahead` is False.

        Raises:
            ValueError: If they are missing, of another shape, NaN, +inf or -inf for all tokens.
        """
        self._step_index(timestep)
        check_type("proposal", proposal, InfoGainProposal, "what `propose` gave")
        if lookahead_logits is not None:
            _check_logits("lookahead_logits", lookahead_logits)
        if lookahead_logits is None:
            if proposal.needs_lookahead:
                raise ValueError("`lookahead_logits` must be given: the candidates of this proposal differ (`needs_lookahead`).")
        elif lookahead_logits.ndim != 4 or lookahead_logits.shape[:3] != proposal.candidates.shape:
            expected = ", ".join(map(str, proposal.candidates.shape))
            raise ValueError(f"`lookahead_logits` must have the shape ({expected}, V), got {tuple(lookahead_logits.shape)}.")
        batch, num, length = proposal.candidates.shape
        samples = torch.arange(batch, device=proposal.cost.device)
        if lookahead_logits is None:
            return proposal.commit(torch.zeros_like(samples), *self.score(None, proposal))
        every = samples.repeat_interleave(num), torch.arange(num, device=samples.device).repeat(batch)
        values = self.score_rows(lookahead_logits.flatten(0, 1), timestep, proposal, every)
        gain, objective = self.score(values.view(batch, num, length), proposal)
        winner = objective.argmax(1)
        pred_logits = lookahead_logits[samples, proposal.duplicate_of[samples, winner]]
        pred_logits = pred_logits.compact() if isinstance(pred_logits, MaskedLogits) else pred_logits
        return proposal.commit(winner, gain, objective, pred_logits)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: draw.Generators = None,
        return_dict: bool = True,
        starting_mask_ratio: float | torch.Tensor | None = None,
    ) -> InfoGainSchedulerOutput | tuple[torch.Tensor, ...]:
        """Decodes the tokens of one step by a greedy rule, as diffusers' pipelines expect of a scheduler.

        Args:
            model_output: Logits (B, L, V) or (B, V, H, W).
            sample: Tokens (B, L) or (B, H, W).
            starting_mask_ratio: The share of all tokens that was masked before the first step, in [0, 1], which the schedule
                then begins at. By default it goes by what is left.

        Raises:
            ValueError: With a sampler that looks ahead, since `step` cannot ask for the logits of its candidates; for shapes
                that do not fit, or a share outside [0, 1].
        """
        if self.looks_ahead:
            raise ValueError(
                f"`step` cannot look ahead as the sampler {self.config.sampler!r} with {self.config.num_candidates} candidates "
                "does: use `InfoGainPipeline`, or `propose` and `select`, or a greedy `sampler`."
            )
        check_bool("return_dict", return_dict)
        check_tensor("sample", sample, [2, 3], "a long tensor (batch, length) or (batch, height, width)", [torch.long])
        described = (
            "a tensor of logits, (batch, length, tokens in the codebook) or (batch, tokens in the codebook, height, width)"
        )
        check_tensor("model_output", model_output, [3, 4], described)
        shape, grid = sample.shape, None
        if sample.ndim == 3:
            if model_output.ndim != 4 or model_output.shape[0] != shape[0] or model_output.shape[2:] != shape[1:]:
                raise ValueError(
                    f"`model_output` must have the shape (batch, tokens in the codebook, height, width) for a `sample` of "
                    f"{tuple(shape)}, got {tuple(model_output.shape)}."
                )
            grid = (shape[1], shape[2])
            sample, model_output = sample.flatten(1), model_output.flatten(2).transpose(1, 2)
        initial_masks = None
        if starting_mask_ratio is not None:
            # diffusers' pipelines give a tensor.
            ratio: Any = starting_mask_ratio
            if isinstance(ratio, torch.Tensor) and ratio.numel() == 1:
                ratio = ratio.item()
            if not (is_number(ratio) and 0 <= ratio <= 1):
                raise ValueError(f"`starting_mask_ratio` must be a number in [0, 1], got {shown(ratio)}.")
            masks = round(ratio * sample.shape[1])
            initial_masks = torch.full((len(sample),), masks, device=sample.device)
        proposal = self.propose(model_output, timestep, sample, generator=generator, grid=grid, initial_masks=initial_masks)
        output = self.select(None, timestep, proposal)
        output.prev_sample = output.prev_sample.reshape(shape)
        return output if return_dict else (output.prev_sample,)

    def add_noise(self, sample: torch.Tensor, timesteps: int | torch.Tensor, generator: draw.Generators = None) -> torch.Tensor:
        """Masks tokens at random, so many as the schedule leaves after a step of an empty canvas, on the average.

        With one generator the masks are those that `AmusedScheduler.add_noise` draws.

        Args:
            sample: Tokens (B, L) or (B, H, W).
            timesteps: One of `timesteps`.
            generator: One generator, drawn from sample after sample, or a list with one per sample.

        Returns:
            A tensor like `sample`, with the mask id at the masked positions.

        Raises:
            ValueError: For an unknown timestep, or a list of generators of another length than the batch.
        """
        check_tensor("sample", sample, [2, 3], "a long tensor (batch, length) or (batch, height, width)", [torch.long])
        index, length = self._step_index(timesteps), sample.shape[1:].numel()
        per_step = self.config.tokens_per_step
        if per_step is None:
            done = torch.tensor((index + 1) / len(self.timesteps), dtype=torch.float32)
            share = schedules.mask_ratio(done, self.config.masking_schedule)
        else:
            left = 0 if index == len(self.timesteps) - 1 else max(length - per_step * (index + 1), 0)
            share = torch.tensor(left / length, dtype=torch.float32)
        uniform = draw.uniforms(generator, len(sample), sample.shape[1:]).to(sample.device)
        return sample.masked_fill(uniform < share.to(sample.device), self.config.mask_token_id)
