"""The rules φ: which masked position is decoded first. One function each; larger is earlier.

A rule sees a `Step`: the M masked positions of all samples together. It returns φ as (M,), or as (M, N) where candidates differ.
To add one, write a function, register it with `@rule("name")`, and give it a line in `choices.SAMPLER_DESCRIPTIONS`.
`SAMPLERS` says what the scheduler does with the rules. No other module compares their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import schedules, scoring
from .candidates import Generators, draw_integers, gumbel, select_positions
from .checks import check_temperature
from .halton import halton_order, usual_grid
from .masked_logits import Logits
from .step import Step
from .token_frequencies import read_surprisals

Phi = Callable[[Step], torch.Tensor]
Remember = Callable[[Step], Mapping[str, Logits]]


def _nothing(step: Step) -> Mapping[str, Logits]:
    """Nothing: most rules only look at the current step."""
    return {}


def _annealed(config: Any, temperature: tuple[float, float], num_steps: int) -> torch.Tensor:
    return schedules.annealed(temperature, num_steps, config.annealing)


@dataclass(frozen=True)
class Rule:
    """A rule, and what the scheduler needs to know about it.

    Attributes:
        name: Its value of the settings `sampler` and `certainty`.
        phi: φ.
        noisy: Whether φ itself is random. With other rules, candidates after the first get Gumbel noise.
        temperature: The setting that is its τ_pos.
        anneal: `anneal(config, pair, num_steps)` is its τ_pos in every step, (T,), from the setting's (start, end).
        draws_tokens: Whether tokens are drawn at its τ_pos, too, and not at `token_temperature`.
        on_grid: Whether it depends on the position of a token in the image grid.
        load: `load(config)` reads what φ needs besides the logits, once.
        begin: `begin(config, generator, batch_size, length)` draws what a sample keeps from its first step on.
        remember: What the next step needs to know about this one.
    """

    name: str
    phi: Phi
    noisy: bool = False
    temperature: str = "position_temperature"
    anneal: Callable[[Any, tuple[float, float], int], torch.Tensor] = _annealed
    draws_tokens: bool = False
    on_grid: bool = False
    load: Callable[[Any], Any] | None = None
    begin: Callable[[Any, Generators, int, int], Mapping[str, torch.Tensor]] | None = None
    remember: Remember = _nothing

    def __call__(self, step: Step) -> torch.Tensor:
        """φ (M, N). Candidate 0 has φ itself. The top k of the others are draws from exp(φ / τ_pos), without replacement.

        τ_pos = 0 leaves φ as it is. With `draw_first` candidate 0 is drawn, too.
        """
        phi = self.phi(step)
        phi = (phi if phi.ndim == 2 else phi[:, None]).expand(step.uniform.shape)
        num_best = int(not step.config.draw_first)
        if self.noisy or phi.shape[1] == num_best:
            return phi
        drawn = torch.where(step.temperature > 0, phi / step.temperature + gumbel(step.uniform), phi)
        return torch.cat([phi[:, :num_best], drawn[:, num_best:]], dim=1)


@dataclass(frozen=True)
class Sampler:
    """A value of the setting `sampler`: a rule, and how the scheduler uses it.

    Attributes:
        rule: Name of the rule; None for the one given by the setting `certainty`.
        looks_ahead: Whether candidates are compared by how uncertain they leave the rest.
        weighs_cost: Whether they are compared by J, not just by the remaining uncertainty.
        entropy_bound: Default of the setting, in nats; 0 for no bound.
        top_p: Default of the setting; 1 for the whole distribution.
        bound_only: Whether the bound alone decides how many positions are decoded, ignoring the schedule.
        ready: (M,) bool, positions to decode right away, however many there are. The schedule remains the slowest pace.
        paced: False if those alone are decoded, however few there are.
        remember: What `ready` needs to know about this step in the next one.
    """

    rule: str | None
    looks_ahead: bool = False
    weighs_cost: bool = True
    entropy_bound: float = 0.0
    top_p: float = 1.0
    bound_only: bool = False
    ready: Phi | None = None
    paced: bool = True
    remember: Remember = _nothing


RULES: dict[str, Rule] = {}
SAMPLERS: dict[str, Sampler] = {
    "info_gain": Sampler(None, looks_ahead=True, entropy_bound=0.5, top_p=0.9),
    "lookum": Sampler(None, looks_ahead=True, weighs_cost=False, entropy_bound=0.5, top_p=0.9),
}


def rule(name: str, **facts: Any) -> Callable[[Phi], Phi]:
    """Registers a function φ as a rule, for the settings `certainty` and `sampler`.

    Args:
        name: Its name.
        facts: Further fields of `Rule`.

    Raises:
        ValueError: If a sampler of that name exists.
    """
    if name in SAMPLERS:
        raise ValueError(f"`name` must be the name of a new rule, got {name!r}, which exists.")

    def register(phi: Phi) -> Phi:
        RULES[name] = Rule(name, phi, **facts)
        SAMPLERS[name] = Sampler(name)
        return phi

    return register


@rule("confidence")
def confidence(step: Step) -> torch.Tensor:
    """max_v p_l(v), or the probability of the token drawn if `certainty_of` = "draws"."""
    return step.draws.probability if step.of_draws else step.confidence


@rule("maskgit", noisy=True, temperature="choice_temperature")
def maskgit(step: Step) -> torch.Tensor:
    """log p_l(v_l) + τ_pos · Gumbel noise, as MaskGIT (arXiv 2202.04200) and aMUSEd do."""
    return step.log_probability + step.temperature * gumbel(step.uniform)


def _annealed_twice(config: Any, temperature: tuple[float, float], num_steps: int) -> torch.Tensor:
    softmax = check_temperature("softmax_temperature", config.softmax_temperature)
    return schedules.annealed_after(temperature, num_steps) * schedules.annealed_after(softmax, num_steps)


@rule("titok", noisy=True, temperature="randomize_temperature", anneal=_annealed_twice, draws_tokens=True)
def titok(step: Step) -> torch.Tensor:
    """The logit of v_l + τ_pos · Gumbel noise, with v_l drawn at τ_pos, as TiTok (arXiv 2406.07550) and MaskGen do."""
    return step.reader.at(step.tokens) + step.temperature * gumbel(step.uniform)


@rule("entropy")
def entropy(step: Step) -> torch.Tensor:
    """-H_l."""
    return -(step.draws.entropy if step.of_draws else step.entropies)


@rule("margin")
def margin(step: Step) -> torch.Tensor:
    """p_(1) - p_(2), the lead of the most probable token over the second."""
    return step.draws.margin if step.of_draws else scoring.margin(step.logits)


@rule("uniform", noisy=True)
def uniform(step: Step) -> torch.Tensor:
    """A random order."""
    return step.uniform


def _halton_starts(config: Any, generator: Generators, batch_size: int, length: int) -> Mapping[str, torch.Tensor]:
    """Where in the order each sample starts, (B,); nothing if all start at its beginning."""
    return {"halton_start": draw_integers(generator, batch_size, length)} if config.halton_randomize else {}


@rule("halton", on_grid=True, begin=_halton_starts)
def halton(step: Step) -> torch.Tensor:
    """Minus the rank in a Halton sequence over the grid (arXiv 2503.17076), wrapping around from each sample's start."""
    length = step.masked.shape[1]
    height, width = step.grid or usual_grid(length)
    if height * width != length:
        raise ValueError(f"`grid` must be given as (height, width) with {length} cells for the halton order, got {step.grid}.")
    rank = halton_order(height, width).to(step.masked.device).expand(step.masked.shape)
    if "halton_start" in step.memory.sample:
        rank = (rank + step.memory.sample["halton_start"].to(rank.device)[:, None]) % length
    return -rank[step.masked].float()


@rule("left")
def left(step: Step) -> torch.Tensor:
    """Minus the position in the canvas: from left to right, or in raster order.

    With an entropy bound this is semi-autoregressive: a step writes on while the entropies of its tokens stay within the bound.
    """
    return -step.masked.nonzero()[:, 1].float()


def _last_logits(step: Step) -> Mapping[str, Logits]:
    return {"logits": step.all_logits, "masked": step.masked}


@rule("klass", remember=_last_logits)
def klass(step: Step) -> torch.Tensor:
    """Confidence, stable positions first (arXiv 2511.05664)."""
    return step.confidence + step.stable


@rule("pivot", noisy=True, temperature="pivot_temperature")
def pivot(step: Step) -> torch.Tensor:
    """-H_l, but the most uncertain position first; candidates after the first draw it in proportion to exp(H / τ_pos)."""
    noise = step.temperature * gumbel(step.uniform)
    noise[:, 0] = 0
    first = step.dense(step.entropies[:, None] + noise, -torch.inf).argmax(-1, keepdim=True)
    # -H <= 0, so 1 comes before all others.
    phi = step.dense(-step.entropies[:, None].expand_as(noise), -torch.inf).scatter(-1, first, 1.0)
    return phi.transpose(1, 2)[step.masked]


@rule("pc_sampler", load=lambda config: read_surprisals(config.pc_frequencies))
def pc_sampler(step: Step) -> torch.Tensor:
    """exp(-λ i) · min(-p_l(v_l) log f(v_l), α), with i the position within the region being decoded (arXiv 2508.13021)."""
    surprisals, vocab_size = step.resource, step.reader.vocab_size
    if len(surprisals) < vocab_size:
        raise ValueError(
            f"`pc_frequencies` must hold a number for each of the model's {vocab_size} tokens, got {len(surprisals)} in "
            f"{step.config.pc_frequencies!r}."
        )
    place = step.allowed.cumsum(-1)[step.masked][:, None] - 1
    surprisal = surprisals.to(step.tokens.device)[step.tokens]
    confidence = step.log_probability.exp() * surprisal
    return (-step.config.pc_decay * place.float()).exp() * confidence.clamp(max=step.config.pc_clip)


def released(step: Step) -> torch.Tensor:
    """(M,) bool: each position for itself, with the probability that the schedule has a token decoded in this step."""
    return step.uniform[:, 0] < step.release


def above_threshold(step: Step) -> torch.Tensor:
    """(M,) bool: probability above `parallel_threshold` (Fast-dLLM, arXiv 2505.22618)."""
    return step.confidence > step.config.parallel_threshold


def above_threshold_and_stable(step: Step) -> torch.Tensor:
    """(M,) bool: also stable for `klass_history` steps (KLASS, arXiv 2511.05664)."""
    return above_threshold(step) & (step.stable_steps >= step.config.klass_history)


def _prefix_within_factor(step: Step, risk: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(M,) bool: the n most confident positions of each sample, for the largest n whose risk is below `parallel_factor`.

    Args:
        risk: Of every n, (B, L), from the sorted doubts 1 - p_(n) (B, L) and n (L,). It must not fall with n.
    """
    doubt, order = step.dense(1 - step.confidence, torch.inf).sort(stable=True)
    n = torch.arange(1, doubt.shape[-1] + 1, device=doubt.device)
    within = risk(doubt, n) < step.config.parallel_factor
    return torch.zeros_like(within).scatter(-1, order, within)[step.masked]


def within_factor(step: Step) -> torch.Tensor:
    """(M,) bool: the n most confident positions, for the largest n with (n + 1)(1 - p_(n)) < f (Fast-dLLM, arXiv 2505.22618).

    p is max_v p_l(v), as in the paper. Its code has the probability of the token drawn, which is the same at temperature 0,
    allows equality, and decodes the last masked position whenever all others qualify.
    """
    return _prefix_within_factor(step, lambda doubt, n: (n + 1) * doubt)


def within_frechet_profile(step: Step) -> torch.Tensor:
    """(M,) bool: the same with Σ_{i <= n} (1 - p_(i)) + 1 - p_(n) < f (Fast-dLLM++, arXiv 2606.02955).

    The paper writes L_n - U_n > δ, where L_n = 1 - Σ_{i <= n} (1 - p_(i)) is the Fréchet bound on the probability of all n tokens
    together, and U_n = 1 - p_(n); so f = 1 - δ. It takes as many equal confidences as `within_factor`, and never fewer of others.
    """
    return _prefix_within_factor(step, lambda doubt, n: doubt.cumsum(-1) + doubt)


def _stable_steps(step: Step) -> Mapping[str, Logits]:
    return {**_last_logits(step), "stable_steps": step.dense(step.stable_steps, 0)}


SAMPLERS |= {
    "ancestral": Sampler("uniform", ready=released, paced=False),
    "entropy_bound": Sampler("entropy", entropy_bound=0.1, bound_only=True),
    "confidence_parallel": Sampler("confidence", ready=above_threshold),
    "klass_parallel": Sampler("confidence", ready=above_threshold_and_stable, remember=_stable_steps),
    "factor_parallel": Sampler("confidence", ready=within_factor),
    "frechet_parallel": Sampler("confidence", ready=within_frechet_profile),
}


def check_combination(config: Any) -> None:
    """Checks the settings that depend on each other.

    Raises:
        ValueError: For the first that does not fit the others.
    """
    sampler = SAMPLERS[config.sampler]
    if sampler.bound_only and config.entropy_bound == 0:
        raise ValueError(f"`entropy_bound` must be above 0, or None, for the sampler {config.sampler!r}, got 0.")
    if sampler.ready is not None and config.confidence_threshold is not None:
        raise ValueError(
            f"`confidence_threshold` must be None for the sampler {config.sampler!r}, which has its own, got "
            f"{config.confidence_threshold}."
        )
    if sampler.looks_ahead and sampler.weighs_cost and config.lazy_threshold is not None and config.gain_reduction == "kl":
        raise ValueError(
            f"`lazy_threshold` must be None with the `gain_reduction` 'kl', whose objective is never negative, got "
            f"{config.lazy_threshold}: use 'sum'."
        )


def commit_early(
    sampler: Sampler, step: Step, phi: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Applies the thresholds to φ (B, N, L) and counts (B,): positions above them come first, those of postponed tokens last.

    Positions that are `ready` are all decoded, with the tokens drawn for them. Otherwise `confidence_threshold` puts the most
    confident positions, up to the number that the step decodes, into every candidate with their most probable token. Positions
    where a postponed token was drawn, or would be most probable there, are neither, and come behind all others.

    Returns:
        φ, the counts, and where the most probable tokens go, (B, L) bool or None for nowhere.
    """
    late = None
    if step.postponed:
        ids = torch.tensor(step.postponed, device=phi.device)
        phi = phi.masked_fill(step.dense(torch.isin(step.tokens, ids), False), torch.finfo(phi.dtype).min)
        late = step.dense(torch.isin(step.logits.argmax(-1), ids), False)
    if sampler.ready is not None:
        ready = step.dense(sampler.ready(step), False)
        if late is not None:
            ready &= phi[:, 0] > torch.finfo(phi.dtype).min
        # The last step decodes all that is left.
        paced = sampler.paced or step.release == 1
        count = torch.maximum(count, ready.sum(-1)) if paced else ready.sum(-1)
        return torch.where(ready[:, None], torch.inf, phi), count, None
    threshold = step.config.confidence_threshold
    if threshold is None:
        return phi, count, None
    confidence = step.dense(step.statistics.top_probability, 0.0)
    if late is not None:
        confidence = confidence.masked_fill(late, 0.0)
    num_above = (confidence > threshold).sum(-1)
    bypass = select_positions(confidence[:, None], confidence, torch.minimum(num_above, count))
    return torch.where(bypass, torch.inf, phi), count, bypass[:, 0]
