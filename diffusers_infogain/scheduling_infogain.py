"""The scheduler: proposes actions, and selects one of them by what it leaves uncertain."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# The name must stand in this module: diffusers finds out how to load a component by looking for it here.
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from . import candidates as draw
from . import checks, correctors, schedules, scoring
from .correctors import Correction
from .masked_logits import Logits, MaskedLogits, check_logits, check_logits_of_tokens, take_states
from .migration import as_saved
from .printing import shown
from .proposal import InfoGainProposal, InfoGainSchedulerOutput
from .reductions import CompileOptions, Reader, statistics
from .rules import RULES, SAMPLERS, check_combination, commit_early
from .settings import SETTINGS
from .settings_in_use import SettingsInUse
from .step import Memory, Step
from .stock_scheduler import StockSchedulerMixin

MOST_STEPS = 10**6
"""Of a run: each step decodes a token at least, and no canvas has that many."""


class InfoGainScheduler(SettingsInUse, StockSchedulerMixin, SchedulerMixin, ConfigMixin):
    """Decides which masked tokens to decode next, and with what, for masked (discrete) diffusion models.

    Info-gain sampling (arXiv 2602.18176) proposes N actions, looks at the model's logits after each, and commits the one with
    the largest J(a) = w · IG(a; z_t) - C(a | z_t): what it takes away from the uncertainty of the tokens still masked,
    less the entropy of the tokens it decodes. The greedy rules it is compared with are proposals with one candidate, so one
    loop and one stream of random numbers serve all.

    A step is `propose`, the model on `proposal.candidates`, and `select`; `decode` is the loop. `step` has the contract of every
    diffusers scheduler, so the greedy rules also run in the stock `AmusedPipeline`.

    Args:
        mask_token_id: Id of the mask. It is never sampled.
        masking_schedule: How the number of masked tokens falls over the steps: "cosine", "linear", "arccos"; "even", which is
            linear with counts that differ by at most one, larger ones first (the published loops of LLaDA and SDAR); or "dream",
            which is nearly linear, and may decode nothing in a step (the published loop of Dream).
        schedule_counts: Of what the schedule leaves a share: of the tokens that were "masked" at first, or of the whole "canvas",
            given tokens too, as the loops of MMaDA and Show-o do, which fill a part of it with one token a step at first.
        tokens_per_step: Decode this many tokens per step instead of following `masking_schedule`.
        sampler: Which tokens a step decodes; `rules.SAMPLERS`, one line each in `choices.SAMPLER_DESCRIPTIONS`. "info_gain" and
            "lookum" (smallest remaining uncertainty, whatever the cost) look ahead. The others are greedy: they decode the
            positions with the largest φ (see `rules`). "entropy_bound", "ancestral" and the parallel ones decide by themselves
            how many.
        certainty: The rule φ by which "info_gain" and "lookum" propose positions; one of `rules.RULES`.
        certainty_of: What confidence, margin and entropy are taken of, as rules: "model", p_l = softmax(logits), or "draws", the
            distribution that tokens are drawn from, where the confidence is the probability of the token drawn (the published
            loops of Dream and SDAR). Costs, gains and bounds are always the model's.
        num_candidates: N, the actions proposed per step by "info_gain" and "lookum". 1 makes them greedy by `certainty`.
        token_temperature: τ_token. Tokens are drawn from softmax(logits / τ_token); 0 takes the most probable one. A pair (start,
            end) of temperatures above 0 is annealed so that the factor on the logits, 1 / τ_token, is linear.
        position_temperature: τ_pos. Candidates after the first draw positions in proportion to exp(φ / τ_pos), without
            replacement. 0 makes candidates differ in tokens only. A pair (start, end) is annealed linearly over the steps or,
            where `entropy_bound` runs ahead of them, over the share of tokens decoded.
        draw_first: Whether the first candidate, or the only one of a greedy sampler, draws its positions, too. With one candidate
            `position_temperature` is then Dream's `alg_temp`.
        choice_temperature: τ_pos of "maskgit": the factor on the Gumbel noise of every candidate. Annealed likewise.
        randomize_temperature, softmax_temperature: ρ and s of "titok", whose τ_pos and τ_token are both ρ · s. Pairs (start, end)
            are annealed to start + (end - start) · (i + 1) / T in step i of T; published are (R, 0) and (1.3, 0.5).
        pivot_temperature: τ_pos of "pivot", in nats: later candidates draw the pivot in proportion to exp(H / τ_pos).
        annealing: How these three go from start to end: "linear", or "product", faster, as in the loops of MMaDA and Show-o.
        top_k: Draw tokens from this many of the most probable ones. Scores always use the whole distribution.
        top_p: Draw tokens from the smallest set that holds this much probability; 1 is all of it. None: the sampler's own, 0.9
            for "info_gain" and "lookum", 1 for the others.
        confidence_threshold: γ. Positions with a probability above it (at most k_t, the most confident) are in every candidate
            with their most probable token. A step that they fill needs no lookahead.
        parallel_threshold: γ of "confidence_parallel" and "klass_parallel", which decode every position above it with its drawn
            token. The schedule is their slowest pace: with one token per step they are the published rules.
        parallel_factor: f of "factor_parallel" and "frechet_parallel", likewise: what the doubts 1 - p may come to.
        gain_weight: w >= 0.
        gain_reduction: "mean" over the masked positions, as in the paper; "sum", which has the scale of the cost (w = 1: J is the
            realised fall of entropy at the positions not decoded); or "kl", which has KL(after ‖ before) in place of that fall:
            the same on average, without its pull towards what is predictable. "lookum" and beam search need an uncertainty and
            read "kl" as "sum".
        entropy_bound: In nats. Decode more than the schedule asks for, in the order of φ, while the sum of the entropies less the
            largest stays within the bound. 0 switches it off. None: the sampler's own, 0.5 for "info_gain" and "lookum", 0.1 for
            "entropy_bound", off for the others.
        lazy_threshold: "info_gain" looks at one candidate after the other, and takes the first with J >= this, in nats, or else
            the best. What it takes is the state that the next step begins with, so only rejected candidates cost something. With
            "sum" and 0, it rejects what leaves it more uncertain about the rest. None compares all of them, as beam search always
            does. It must be None with "kl", whose J is never negative.
        best_run_by: What best-of-N keeps: the smallest "cumulative_entropy" H~ = Σ H_l, the largest "log_likelihood"
            S = Σ log p_l(v_l), or the smallest H~ - S, "entropy_and_likelihood".
        num_tries: How often a sample is begun at most if one of the next three is set. The last try is always kept.
        retry_above_nats: Begin a sample anew once H~ - S rises above this, in nats.
        retry_below_nats: The same once S falls below this, in nats.
        retry_below_sigmas: The same once S + H~, which is 0 on average, falls below this many of its standard deviations.
        corrector: Whether decoded tokens are masked again, so that errors can be mended; `correctors.CORRECTORS`. "verify" masks
            class after class of the finished sample; "remdm_conf", "remdm_loop" (ReMDM) and "p2" mask tokens within the steps;
            "edit" replaces tokens.
        verify_threshold: θ. A token stays if p_l(v_l) >= θ · max_v p_l(v), else it is drawn anew, within `entropy_bound`.
        verify_classes: How many classes there are: residue classes of positions, spread evenly over line or grid.
        remdm_eta: η, the limit of σ, the probability with which ReMDM masks a token again. None: the corrector's own, 1 for
            "remdm_conf" (whose σ are shares of that), 0.02 for "remdm_loop". 0 switches it off.
        remdm_t_on, remdm_t_off, remdm_alpha_on: "remdm_loop" masks again while t, which falls from 1 to 0, is between the two and
            the share α of the tokens is decoded. It has a schedule of its own, without `tokens_per_step` or `entropy_bound`.
        p2_eta: η of "p2", the factor on the log-probabilities of decoded tokens; the larger, the more are masked again.
        editing_threshold: τ. "edit" replaces a decoded token by the most probable one where the probability of that is above τ.
        max_post_steps: Once nothing is masked "edit" looks at the sample, and so many times more while something is replaced.
        klass_threshold: In nats. For "klass" and "klass_parallel" a position is stable if KL(now ‖ previous step) is below it.
        klass_history: Consecutive steps, including the current one, for which "klass_parallel" wants a position to be stable.
            `step()` has no history, so there none is.
        halton_randomize: "halton" starts each sample at a random place of its order, wrapping around. `step()` does not know
            where a sample begins, so there all start at the first place.
        pc_frequencies: File with how often each token occurs in text (see `token_frequencies`), for "pc_sampler". The first
            `set_timesteps` reads it.
        pc_decay, pc_clip: λ and α of "pc_sampler": how fast φ falls along the active region, and the limit of its confidence.

    Raises:
        ValueError: For a value outside these ranges, naming it and what is allowed.
    """

    order = 1
    _compatibles = ["AmusedScheduler"]  # whose configurations `from_config` takes

    timesteps: torch.Tensor
    position_temperatures: torch.Tensor

    @register_to_config
    def __init__(
        self,
        mask_token_id: int,
        *,
        masking_schedule: str = "cosine",
        schedule_counts: str = "masked",
        tokens_per_step: int | None = None,
        sampler: str = "info_gain",
        certainty: str = "halton",
        certainty_of: str = "model",
        num_candidates: int = 4,
        token_temperature: float | tuple[float, float] = 1.0,
        position_temperature: float | tuple[float, float] = 0.4,
        draw_first: bool = False,
        choice_temperature: float | tuple[float, float] = (2.0, 0.0),
        randomize_temperature: float | tuple[float, float] = (1.0, 0.0),
        softmax_temperature: float | tuple[float, float] = 1.0,
        pivot_temperature: float | tuple[float, float] = 1.0,
        annealing: str = "linear",
        top_k: int | None = None,
        top_p: float | None = None,
        confidence_threshold: float | None = None,
        parallel_threshold: float = 0.9,
        parallel_factor: float = 1.0,
        gain_weight: float = 1.0,
        gain_reduction: str = "sum",
        entropy_bound: float | None = None,
        lazy_threshold: float | None = -5.0,
        best_run_by: str = "entropy_and_likelihood",
        num_tries: int = 3,
        retry_above_nats: float | None = None,
        retry_below_nats: float | None = None,
        retry_below_sigmas: float | None = None,
        corrector: str | None = None,
        verify_threshold: float = 0.3,
        verify_classes: int = 4,
        remdm_eta: float | None = None,
        remdm_t_on: float = 0.55,
        remdm_t_off: float = 0.05,
        remdm_alpha_on: float = 0.9,
        p2_eta: float = 1.0,
        editing_threshold: float = 0.5,
        max_post_steps: int = 16,
        klass_threshold: float = 5e-4,
        klass_history: int = 2,
        halton_randomize: bool = False,
        pc_frequencies: str | None = None,
        pc_decay: float = 0.25,
        pc_clip: float = 10.0,
    ):
        checks.check_integer("mask_token_id", mask_token_id, 0)
        checks.check_choice("sampler", sampler, tuple(SAMPLERS))
        checks.check_choice("certainty", certainty, tuple(RULES))
        for name, setting in SETTINGS.items():
            setting.check(name, self.config[name])
        check_combination(self.config)
        correctors.check_settings(self.config, self.entropy_bound)
        self.timesteps = None  # type: ignore[assignment]  # until `set_timesteps`
        self.position_temperatures = None  # type: ignore[assignment]
        self._resource: Any = None
        self.compile_options: CompileOptions | None = None
        self.postponed: tuple[int, ...] = ()  # tokens that a call of the text pipeline decodes last

    def compile(self, **options: Any) -> None:
        """Has what is read from logits fused by `torch.compile` from now on: equal up to rounding, and no part of the config.

        Args:
            options: Of `torch.compile`; `dynamic` is True by default.
        """
        self.compile_options = tuple({"dynamic": True, **options}.items())

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
        checks.check_type("config", config, (Mapping, type(None)), "the configuration of a scheduler, a mapping, or None")
        checks.check_bool("return_unused_kwargs", return_unused_kwargs)
        if not return_unused_kwargs:
            given = [name for name in settings if name != "pretrained_model_name_or_path"]
            checks.check_known(cls.__name__, given, list(inspect.signature(cls.__init__).parameters)[1:])
        if config is not None:
            if not all(isinstance(name, str) for name in config):
                raise ValueError(f"`config` must have strings as its keys, got {shown(list(config))}.")
            # diffusers lists there what was not given by keyword, and drops it: positional arguments as well.
            config = {name: value for name, value in config.items() if name != "_use_default_values"}
            config = as_saved(config)
        return super().from_config(config, return_unused_kwargs, **settings)

    @property
    def all_timesteps(self) -> torch.Tensor:
        """`timesteps`, the last one once more for each step that the corrector may add."""
        return torch.cat([self.timesteps, self.timesteps[-1:].expand(correctors.num_own_steps(self.config))])

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | Sequence[float] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Lays out the steps: `timesteps` runs from `num_inference_steps` - 1 down to 0.

        Args:
            temperature: Replaces the temperature of the rule in use for this run (the place where `AmusedPipeline` passes its
                own).

        Raises:
            ValueError: For numbers outside these ranges, or for "pc_sampler" without usable `pc_frequencies`.
        """
        checks.check_integer("num_inference_steps", num_inference_steps, 1, MOST_STEPS)
        if self.rule.load is not None and self._resource is None:
            self._resource = self.rule.load(self.config)
        name = self.rule.temperature if temperature is None else "temperature"
        pair = checks.check_temperature(name, self.config[name] if temperature is None else temperature)
        checks.check_device("device", device)
        self.timesteps = torch.arange(num_inference_steps, device=device).flip(0)
        self.position_temperatures = self.rule.anneal(self.config, pair, num_inference_steps)

    def with_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> InfoGainScheduler:
        """A copy after `set_timesteps`, while this scheduler stays as it is: for runs side by side, as in threads."""
        own = copy.copy(self)
        own.set_timesteps(num_inference_steps, device=device)
        return own

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

    def mask_again(
        self, tokens: torch.Tensor, masked: torch.Tensor, memory: Memory | None, grid: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Memory | None]:
        """Before a step: masks what the corrector "verify" looks at next, a class of positions of each sample that is decoded.

        Args:
            tokens: (B, L) long.
            masked: (B, L) bool, positions still to be decoded.
            memory: Of the proposal before; None in the first step.
            grid: (height, width) of the tokens; by default they are a line.

        Returns:
            The tokens, (B,) bool which samples the corrector looks at in the next step, and the memory for `propose`.
        """
        if memory is not None and self.corrector.edits:
            return tokens, correctors.edits_on(masked, memory, self.config), memory
        if memory is None or not self.corrector.verifies:
            return tokens, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), memory
        return correctors.mask_next_class(tokens, masked, memory, grid, self.config)

    def propose(
        self,
        logits: Logits,
        timestep: int | torch.Tensor,
        tokens: torch.Tensor,
        allowed: torch.Tensor | None = None,
        *,
        generator: draw.Generators = None,
        memory: Memory | None = None,
        initial_masks: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> InfoGainProposal:
        """Draws the candidate actions of a step. Changes neither its arguments nor the scheduler.

        Args:
            logits: (B, L, V) of `tokens`, after guidance, on the tokens that may be sampled. Logits at masked positions suffice
                (`MaskedLogits`).
            timestep: One of `timesteps`.
            tokens: (B, L) long, z_t.
            allowed: (B, L) bool, positions that may be decoded now, such as the active block; by default all.
            generator: One generator, drawn from sample after sample, or a list with one per sample.
            memory: `memory` of the proposal before; None in the first step of the samples.
            initial_masks: (B,) masked positions before the first step. Without it the schedule goes by what is left, which is
                exact for canvases that were masked completely, and nearly so otherwise.
            grid: (height, width) of the tokens, for "halton"; by default a square, or a line if L is no square number.

        Raises:
            ValueError: For shapes that do not fit, an unknown timestep, or logits that are NaN, +inf or -inf for all tokens.
        """
        index = self.step_index(timestep)
        check_logits_of_tokens(logits, tokens)
        checks.check_type("memory", memory, (Memory, type(None)), "the `memory` of a proposal, or None")
        checks.check_integers("initial_masks", initial_masks, len(tokens))
        checks.check_grid("grid", grid)
        masked = self.undecided(tokens, allowed)
        region = torch.ones_like(masked) if allowed is None else allowed
        correction = Correction(self.config, logits, tokens, masked, memory, index, len(self.timesteps))
        tokens, masked = correction.tokens, correction.masked
        step = self._step(logits, index, masked, region, initial_masks, generator, memory, grid)
        whole = region.sum(-1)
        count = schedules.decode_counts(
            masked.sum(-1),
            index,
            len(self.timesteps),
            self.config.masking_schedule,
            tokens_per_step=self.config.tokens_per_step,
            initial_masks=whole if self.config.schedule_counts == "canvas" else initial_masks,
            max_masks=None if initial_masks is not None else whole,
        )
        return self._proposal(step, correction, correction.counts(count), index, generator)

    def _proposal(
        self, step: Step, correction: Correction, count: torch.Tensor, index: int, generator: draw.Generators
    ) -> InfoGainProposal:
        """The candidates of a step that decodes `count` (B,) tokens, or more within the entropy bound."""
        masked, tokens, logits = step.masked, correction.tokens, step.all_logits
        # φ of every masked position of every candidate.
        phi = step.dense(self.rule(step), -torch.inf)
        entropies = step.dense(step.entropies, 0.0)
        phi, count, most_probable = commit_early(self._sampler, step, phi, count)
        # What a corrector masks again, as many more are decoded.
        remasked = correction.remask(
            count,
            lambda: step.dense(step.decoded_at(masked, most_probable)[1], 0.0)[:, 0],
            lambda: draw.uniforms(generator, len(masked), masked.shape[1:]),
        )
        if remasked is not None:
            count = count + remasked.sum(-1)
        # The action A of each candidate: its k_t best positions, or more within the entropy bound.
        bound_only = self._sampler.bound_only and index < len(self.timesteps) - 1
        # In memory order, so that the costs of equal candidates are sums in the same order and equal to the last bit.
        selected = draw.select_positions(phi.contiguous(), entropies, count, self.entropy_bound, bound_only)
        decoded = selected.any(1)
        found, log_p = step.decoded_at(decoded, most_probable)
        values, log_p = step.dense(found, 0, decoded), step.dense(log_p, 0.0, decoded)
        candidates = torch.where(selected, values, tokens[:, None])
        if remasked is not None:
            candidates = candidates.masked_fill(remasked[:, None], self.config.mask_token_id)
        # What `select` needs to know about z_t, and the next step about this one.
        keeps_logits = self.looks_ahead and self.objective.compares_distributions
        remembered = {**self.rule.remember(step), **self._sampler.remember(step)}
        variance = None
        if self.retries:
            variance = scoring.action_cost(step.dense(scoring.surprisal_variance(step.logits), 0.0)[:, None], selected)
        # Candidates that lead to one state are run once; if all do, a lookahead has nothing to decide.
        duplicate_of = draw.first_occurrence(candidates)
        compared = torch.ones(len(masked), dtype=torch.bool, device=masked.device)
        if correction.verified is not None:
            compared = ~correction.verified
        return InfoGainProposal(
            candidates=candidates,
            selected=selected,
            cost=scoring.action_cost(entropies[:, None], selected),
            log_probability=torch.where(selected, log_p, 0.0).sum(-1),
            variance=variance,
            needs_lookahead=self.looks_ahead and draw.differ(compared, duplicate_of, masked, selected),
            masked=masked,
            remasked=torch.zeros_like(masked) if remasked is None else remasked,
            compared=compared,
            entropies=entropies,
            duplicate_of=duplicate_of,
            logits=logits if keeps_logits else None,
            memory=Memory({**step.memory.sample, **correction.remember(selected, values, log_p)}, remembered),
        )

    def _step(
        self,
        logits: Logits,
        index: int,
        masked: torch.Tensor,
        region: torch.Tensor,
        initial_masks: torch.Tensor | None,
        generator: draw.Generators,
        memory: Memory | None,
        grid: tuple[int, int] | None,
    ) -> Step:
        """Draws the random numbers of every candidate, reads the logits once, and collects what a rule may look at."""
        config, rule = self.config, self.rule
        batch, length = masked.shape
        if memory is None:
            memory = Memory({} if rule.begin is None else rule.begin(config, generator, batch, length))
        reader = Reader(logits, masked, config.mask_token_id)
        found = statistics(reader, self.compile_options)
        reader.check(found.top, index)
        temperature = self.position_temperatures
        share_left = None
        if self.entropy_bound > 0 and temperature[0] != temperature[-1]:
            share_left = masked.sum(-1).float() / (region.sum(-1) if initial_masks is None else initial_masks).clamp(min=1)
        return Step(
            reader=reader,
            statistics=found,
            uniforms=draw.draw_uniforms(generator, batch, self.num_compared, length).to(masked.device),
            position_temperature=schedules.temperature_at(temperature, index, share_left),
            token_temperature=float(temperature[index])
            if rule.draws_tokens
            else schedules.annealed_inversely(config.token_temperature, index, len(self.timesteps)),
            top_p=self.top_p,
            masked=masked,
            allowed=region,
            grid=grid,
            memory=memory,
            config=config,
            resource=self._resource,
            all_logits=logits,
            release=schedules.release_probability(
                index,
                len(self.timesteps),
                config.masking_schedule,
                tokens_per_step=config.tokens_per_step,
                length=masked.shape[1],
            ),
            postponed=self.postponed,
        )

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
        index = self.step_index(timestep)
        checks.check_type("proposal", proposal, InfoGainProposal, "what `propose` returned")
        batch, num, length = proposal.candidates.shape
        samples = torch.arange(batch, device=proposal.cost.device)
        if lookahead_logits is None:
            if proposal.needs_lookahead:
                raise ValueError("`lookahead_logits` must be given: the candidates of this proposal differ (`needs_lookahead`).")
            return proposal.commit(torch.zeros_like(samples), *self.objective(None, proposal))
        check_logits("lookahead_logits", lookahead_logits)
        if len(lookahead_logits.shape) != 4 or lookahead_logits.shape[:3] != proposal.candidates.shape:
            expected = ", ".join(map(str, proposal.candidates.shape))
            raise ValueError(f"`lookahead_logits` must have the shape ({expected}, V), got {tuple(lookahead_logits.shape)}.")
        flat = lookahead_logits.flatten() if isinstance(lookahead_logits, MaskedLogits) else lookahead_logits.flatten(0, 1)
        all_candidates = samples.repeat_interleave(num), torch.arange(num, device=samples.device).repeat(batch)
        evidence = self.objective.evidence(flat, proposal, all_candidates, index, self.objective.before(proposal))
        gain, objective = self.objective(evidence.view(batch, num, length), proposal)
        winner = objective.argmax(1)
        pred_logits = take_states(flat, samples * num + proposal.duplicate_of[samples, winner])
        return proposal.commit(winner, gain, objective, pred_logits)
