"""Correctors: tokens that were decoded are masked again, or replaced, so that errors can be mended.

The mathematics first, as pure functions with the letters of the papers: α is the share of the tokens that is decoded, at time t
before a step and at s < t after it; σ is the probability with which a decoded token is masked again. `CORRECTORS` says what the
scheduler does with them. Tokens that were known from the start are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .masked_logits import Logits, MaskedLogits
from .reductions import Reader, statistics
from .schedules import mask_ratio
from .scoring import log_probability
from .settings import RETRY_LIMITS
from .step import Memory


def residue_classes(length: int, grid: tuple[int, int] | None, num_classes: int) -> torch.Tensor:
    """(x + ⌊√n⌋ y) mod n: the class (L,) of the position in column x and row y of a grid (height, width), or of position x.

    Each class is spread evenly, so that a masked position keeps most of its neighbours.
    """
    position = torch.arange(length)
    width = length if grid is None else grid[1]
    return (position % width + math.isqrt(num_classes) * (position // width)) % num_classes


def is_plausible(logits: torch.Tensor, tokens: torch.Tensor, threshold: float) -> torch.Tensor:
    """p_l(v_l) >= θ · max_v p_l(v): (..., V) and (...) long to (...) bool.

    Relative to the most probable token, so that tokens with many synonyms are not taken for errors.
    """
    log_p = log_probability(logits, tokens[..., None])[..., 0]
    return (log_p - logits.float().amax(-1) + logits.float().logsumexp(-1)).exp() >= threshold


def edited(logits: torch.Tensor, tokens: torch.Tensor, threshold: float) -> torch.Tensor:
    """argmax_v p_l(v) where its probability is above τ, v_l elsewhere: (..., V) and (...) long to (...) long."""
    logits = logits.float()
    top, token = logits.max(-1)
    return torch.where((top - logits.logsumexp(-1)).exp() > threshold, token, tokens)


def remdm_limit(alpha_t: torch.Tensor, alpha_s: torch.Tensor) -> torch.Tensor:
    """σ_max = min(1, (1 - α_s) / α_t): the largest σ of ReMDM (arXiv 2503.00307), with which no more is masked than at time s."""
    return ((1 - alpha_s) / alpha_t).clamp(max=1)


def remdm_confidence(probability: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """η_l of ReMDM-conf, the softmax of -ψ over the decoded positions: (..., L) and bool (..., L) to (..., L).

    Args:
        probability: ψ_l, p_l(v_l) of the tokens when they were decoded.
    """
    eta = (-probability).masked_fill(~decoded, -torch.inf).softmax(-1)
    return torch.where(decoded, eta, 0.0)


def remdm_loop_share(u: float, masking_schedule: str, t_on: float, t_off: float, alpha_on: float) -> float:
    """1 - α of ReMDM-loop when the share u = 1 - t of the steps is done: the share of the tokens that is masked.

    α rises to α_on until t_on, stays until t_off, and rises to 1 at t = 0. In the paper it rises linearly; here both rises have
    the form of the masking schedule, which is the same for "linear" and "even".
    """
    start, end = 1 - t_on, 1 - t_off
    if u < start:
        return 1 - alpha_on * (1 - mask_ratio(torch.tensor(u / start), masking_schedule).item())
    if u <= end:
        return 1 - alpha_on
    return (1 - alpha_on) * mask_ratio(torch.tensor((u - end) / t_off), masking_schedule).item()


def draw_remasked(sigma: torch.Tensor, uniform: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Positions drawn with probability σ_l each, but at most so many: (B, L), uniform numbers (B, L) and (B,) to (B, L) bool."""
    drawn = uniform < sigma
    order = torch.where(drawn, uniform / sigma, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
    return drawn & (order < most[:, None])


def lowest(scores: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The positions of the `count` (B,) lowest scores (B, L), as a mask; at equal scores the earlier position."""
    return scores.argsort(dim=-1, stable=True).argsort(-1) < count[:, None]


@dataclass(frozen=True, kw_only=True)
class CorrectionStep:
    """What a corrector may look at when it decides what a step masks again: B samples, L positions.

    Attributes:
        config: The scheduler's settings.
        index: The number of the step, from 0, of `num_steps`.
        logits: (B, L, V) as the model returned them.
        tokens: (B, L) long, z_t.
        masked: (B, L) bool, M_t.
        decoded: (B, L) bool, positions that were decoded in earlier steps.
        num_left: (B,) long, how many masks the schedule leaves after the step.
        log_probability: Gives log p_l(v_l), (B, L), of the tokens that the first candidate has for masked positions.
        probability: (B, L) p_l(v_l) of decoded tokens when they were decoded, if the corrector remembers it.
        uniforms: Gives random numbers (B, L) in [0, 1).
    """

    config: Any
    index: int
    num_steps: int
    logits: Logits
    tokens: torch.Tensor
    masked: torch.Tensor
    decoded: torch.Tensor
    num_left: torch.Tensor
    log_probability: Callable[[], torch.Tensor]
    probability: torch.Tensor
    uniforms: Callable[[], torch.Tensor]

    def draw(self, sigma: torch.Tensor) -> torch.Tensor:
        """Decoded positions, drawn with probability σ (B, L), but no more than masks are left after the step."""
        uniform = self.uniforms().to(self.tokens.device)
        return draw_remasked(torch.where(self.decoded, sigma, 0.0), uniform, self.num_left)

    def none(self) -> torch.Tensor:
        """No positions."""
        return torch.zeros_like(self.masked)


def remdm_conf(step: CorrectionStep) -> torch.Tensor:
    """ReMDM-conf (arXiv 2503.00307): σ_l = η_l · min(η, σ_max), with η_l = softmax(-ψ)_l, ψ_l = p_l(v_l) at the time of decoding.

    As published, Σ η_l = 1: a step masks at most one token again on average. α is the share that really is decoded, so that it
    also holds for canvases with known tokens and for counts that are rounded.
    """
    eta = 1.0 if step.config.remdm_eta is None else step.config.remdm_eta
    if eta == 0:
        return step.none()
    total = (step.masked | step.decoded).sum(-1).clamp(min=1).float()
    alpha_t, alpha_s = step.decoded.sum(-1) / total, 1 - step.num_left / total
    sigma = remdm_limit(alpha_t, alpha_s).clamp(max=eta)
    return step.draw(remdm_confidence(step.probability, step.decoded) * sigma[:, None])


def remdm_loop(step: CorrectionStep) -> torch.Tensor:
    """ReMDM-loop (arXiv 2503.00307): σ = min(η, σ_max) while t_off < t <= t_on, where α stays at α_on, else 0."""
    config = step.config
    eta = 0.02 if config.remdm_eta is None else config.remdm_eta
    t = 1 - step.index / step.num_steps
    if eta == 0 or not config.remdm_t_off < t <= config.remdm_t_on:
        return step.none()
    alpha_on = torch.tensor(config.remdm_alpha_on)
    sigma = remdm_limit(alpha_on, alpha_on).clamp(max=eta)
    return step.draw(sigma.to(step.tokens.device).expand(step.masked.shape))


def p2(step: CorrectionStep) -> torch.Tensor:
    """P2, self-planning (arXiv 2502.03540): of all tokens, those with the lowest score are masked after the step.

    The score of a token that a step would decode is log p_l(v_l), that of a decoded one η · log p_l(v_l) at its own, visible
    position. The paper's code draws a token anew to score a decoded position; here it is the token that stands there. Which of
    the masked positions are decoded is the sampler's decision: "maskgit" with `choice_temperature` 0 takes those with the highest
    score, as published.

    Raises:
        ValueError: If there are no logits at decoded positions.
    """
    if step.config.p2_eta == 0:
        return step.none()
    reader = _reader_at(step.decoded, step.logits, step.config)
    found = statistics(reader)
    reader.check(found.top, step.index)
    scores = torch.where(step.masked, step.log_probability(), torch.inf)
    log_p = found.log_probability(reader.at(step.tokens[step.decoded][:, None]))[:, 0]
    scores[step.decoded] = step.config.p2_eta * log_p
    return lowest(scores, step.num_left) & step.decoded


def _reader_at(decoded: torch.Tensor, logits: Logits, config: Any) -> Reader:
    """The logits at decoded positions, (B, L) bool."""
    if isinstance(logits, MaskedLogits) and (logits.index[decoded] < 0).any():
        raise ValueError(f"`denoise` must return logits at decoded positions, too, with the corrector {config.corrector!r}.")
    return Reader(logits, decoded, config.mask_token_id)


@dataclass(frozen=True)
class Corrector:
    """A value of the setting `corrector`, and how the scheduler uses it.

    Attributes:
        remask: What a step masks again, (B, L) bool, in addition to decoding as many tokens more.
        loops: Whether its own α replaces the masking schedule.
        remembers: Whether it needs to know how probable tokens were when they were decoded.
        reads_decoded: Whether it needs logits at decoded positions.
        verifies: Whether it masks class after class once nothing else is masked, in steps of its own.
        edits: Whether it replaces decoded tokens, also in steps of its own once nothing is masked.
    """

    remask: Callable[[CorrectionStep], torch.Tensor] | None = None
    loops: bool = False
    remembers: bool = False
    reads_decoded: bool = False
    verifies: bool = False
    edits: bool = False


CORRECTORS: dict[str | None, Corrector] = {
    None: Corrector(),
    "verify": Corrector(verifies=True),
    "remdm_conf": Corrector(remdm_conf, remembers=True),
    "remdm_loop": Corrector(remdm_loop, loops=True),
    "p2": Corrector(p2, reads_decoded=True),
    "edit": Corrector(reads_decoded=True, edits=True),
}


# Within a run: what samples remember, and how `verify` goes from class to class


def num_own_steps(config: Any) -> int:
    """The most steps that a corrector adds to those of the schedule.

    `verify` takes one a class, and as many for what is left; `edit` one that sees the finished sample, and `max_post_steps` more.
    """
    corrector = CORRECTORS[config.corrector]
    if corrector.edits:
        return 1 + config.max_post_steps
    return 2 * config.verify_classes if corrector.verifies else 0


def check_settings(config: Any, entropy_bound: float) -> None:
    """Raises a ValueError that names a setting that cannot be combined with the corrector, or with another of its own."""
    name = config.corrector
    if not config.remdm_t_off < config.remdm_t_on:
        raise ValueError(
            f"`remdm_t_off` must be below `remdm_t_on`, got {config.remdm_t_off} and {config.remdm_t_on}: t falls from 1 to 0."
        )
    if name is None:
        return
    for setting in RETRY_LIMITS:
        if config[setting] is not None:
            raise ValueError(f"`{setting}` must be None with the corrector {name!r}, got {config[setting]}.")
    if CORRECTORS[name].loops and config.tokens_per_step is not None:
        raise ValueError(
            f"`tokens_per_step` must be None with the corrector {name!r}, which has a schedule of its own, got "
            f"{config.tokens_per_step}."
        )
    if CORRECTORS[name].loops and entropy_bound > 0:
        raise ValueError(
            f"`entropy_bound` must be 0 with the corrector {name!r}, which has a schedule of its own, got {entropy_bound} (in "
            f"use with the sampler {config.sampler!r})."
        )


def first_memory(config: Any, masked: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a corrector keeps of samples whose masks (B, L) are about to be decoded, for `Memory.sample`."""
    corrector = CORRECTORS[config.corrector]
    sample: dict[str, torch.Tensor] = {}
    if corrector != Corrector():
        sample["decodable"] = masked
    if corrector.remembers:
        sample["probability"] = torch.zeros(masked.shape, dtype=torch.float32, device=masked.device)
    if corrector.verifies:
        zeros = torch.zeros(len(masked), dtype=torch.long, device=masked.device)
        doubted = torch.full(masked.shape, config.mask_token_id, dtype=torch.long, device=masked.device)
        sample |= {"next_class": zeros, "own_step": zeros, "doubted": doubted}
    if corrector.edits:
        sample |= {"own_step": torch.zeros(len(masked), dtype=torch.long, device=masked.device), "edits": masked.any(-1)}
    return sample


def edits_on(masked: torch.Tensor, memory: Memory, config: Any) -> torch.Tensor:
    """(B,) bool, decoded samples that are looked at once more: the step before decoded or replaced tokens, and steps are left."""
    return ~masked.any(-1) & memory.sample["edits"] & (memory.sample["own_step"] <= config.max_post_steps)


def mask_next_class(
    tokens: torch.Tensor, masked: torch.Tensor, memory: Memory, grid: tuple[int, int] | None, config: Any
) -> tuple[torch.Tensor, torch.Tensor, Memory]:
    """Masks the next class of those samples that are decoded, or are being verified already.

    Args:
        tokens: (B, L) long.
        masked: (B, L) bool, positions that are still to be decoded. They stay masked, beside the class.
        memory: Of the step before.

    Returns:
        The tokens, (B,) bool which samples are verified in the next step, and the memory.
    """
    decodable, next_class, own_step = (memory.sample[name] for name in ("decodable", "next_class", "own_step"))
    numbers = torch.arange(config.verify_classes, device=tokens.device)
    classes = residue_classes(tokens.shape[1], grid, config.verify_classes).to(tokens.device)
    members = decodable[:, None] & (classes == numbers[:, None])  # (B, n, L)
    verified = (own_step > 0) | (decodable.any(-1) & ~masked.any(-1))
    # Classes without a position are skipped.
    ahead = members.any(-1) & (numbers >= next_class[:, None]) & verified[:, None]
    chosen, found = ahead.int().argmax(-1), ahead.any(-1)
    doubted = members[torch.arange(len(tokens), device=tokens.device), chosen] & found[:, None]
    progress = {
        "next_class": torch.where(found, chosen + 1, next_class),
        "own_step": own_step + verified.long(),
        "doubted": torch.where(doubted, tokens, config.mask_token_id),  # of members that are masked already there is no token
    }
    tokens = tokens.masked_fill(doubted, config.mask_token_id)
    return tokens, verified & (masked | doubted).any(-1), replace(memory, sample={**memory.sample, **progress})


class Correction:
    """What a corrector does in a step of the scheduler: B samples, N candidates, L positions.

    Args:
        config: The scheduler's settings.
        logits: (B, L, V) as the model returned them.
        tokens: (B, L) long, z_t.
        masked: (B, L) bool, M_t.
        memory: From the step before; None in the first.
        index: The number of the step, from 0, of `num_steps`.

    Attributes:
        tokens, masked: With those tokens of a class that is verified back in their places that may stay.
        verified: (B,) bool, samples that are being verified; None for other correctors.

    Raises:
        ValueError: If the memory is of a scheduler without this corrector.
    """

    def __init__(
        self,
        config: Any,
        logits: Logits,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        memory: Memory | None,
        index: int,
        num_steps: int,
    ):
        self.config, self.logits, self.index, self.num_steps = config, logits, index, num_steps
        self.corrector = CORRECTORS[config.corrector]
        self.sample = first_memory(config, masked) if memory is None else memory.sample
        if config.corrector is not None and "decodable" not in self.sample:
            raise ValueError(
                f"`memory` must be None in the first step, and then that of the proposal before, with the corrector "
                f"{config.corrector!r}."
            )
        self.tokens, self.masked = tokens, masked
        self.verified: torch.Tensor | None = None
        if self.corrector.verifies:
            self.verified = self.sample["own_step"] > 0
            self.tokens = self._restored()
            self.masked = masked & (self.tokens == config.mask_token_id)
        if self.corrector.edits:
            self._edit()

    def _edit(self) -> None:
        left, own_step = self.masked.any(-1), self.sample["own_step"]
        # Samples that are finished have no logits.
        running = left | (self.sample["edits"] & (own_step <= self.config.max_post_steps))
        decoded = self.sample["decodable"] & ~self.masked & running[:, None]
        tokens = self.tokens
        if decoded.any():
            reader = _reader_at(decoded, self.logits, self.config)
            rows = reader.read()
            reader.check(rows.amax(-1), self.index)
            tokens = tokens.masked_scatter(decoded, edited(rows, tokens[decoded], self.config.editing_threshold))
        replaced = (tokens != self.tokens).any(-1)
        self.sample = {**self.sample, "edits": running & (left | replaced), "own_step": own_step + (running & ~left).long()}
        self.tokens = tokens

    def _restored(self) -> torch.Tensor:
        doubted, mask_token_id = self.sample["doubted"], self.config.mask_token_id
        tested = doubted != mask_token_id
        reader = Reader(self.logits, tested, mask_token_id)
        rows = reader.read()
        reader.check(rows.amax(-1), self.index)
        tokens = self.tokens.clone()
        stays = is_plausible(rows, doubted[tested], self.config.verify_threshold)
        tokens[tested] = torch.where(stays, doubted[tested], mask_token_id)
        return tokens

    def counts(self, scheduled: torch.Tensor) -> torch.Tensor:
        """(B,) How many tokens the step decodes, in place of the schedule's counts (B,)."""
        config, num_masked = self.config, self.masked.sum(-1)
        if self.corrector.loops and self.index < self.num_steps - 1:
            settings = config.masking_schedule, config.remdm_t_on, config.remdm_t_off, config.remdm_alpha_on
            share = remdm_loop_share((self.index + 1) / self.num_steps, *settings)
            left = (self.sample["decodable"].sum(-1) * share).round().long()
            return (num_masked - left).clamp(min=0)
        if self.corrector.verifies:
            # ⌈failed / own steps left⌉ for samples that are verified; an entropy bound may allow more.
            steps_left = (num_own_steps(config) - self.sample["own_step"] + 1).clamp(min=1)
            return torch.where(self.sample["own_step"] > 0, -(-num_masked // steps_left), scheduled)
        return scheduled

    def remask(
        self, count: torch.Tensor, log_probability: Callable[[], torch.Tensor], uniforms: Callable[[], torch.Tensor]
    ) -> torch.Tensor | None:
        """The positions (B, L) that the step masks again; None for a corrector that masks nothing within the steps.

        Args:
            count: (B,) tokens that the step decodes by itself.
            log_probability: Gives log p_l(v_l), (B, L), of the tokens that the first candidate has for masked positions.
            uniforms: Gives random numbers (B, L) in [0, 1).
        """
        if self.corrector.remask is None:
            return None
        decoded = self.sample["decodable"] & ~self.masked
        return self.corrector.remask(
            CorrectionStep(
                config=self.config,
                index=self.index,
                num_steps=self.num_steps,
                logits=self.logits,
                tokens=self.tokens,
                masked=self.masked,
                decoded=decoded,
                num_left=self.masked.sum(-1) - count,
                log_probability=log_probability,
                probability=self._probability() if self.corrector.remembers else decoded.float(),
                uniforms=uniforms,
            )
        )

    def _probability(self) -> torch.Tensor:
        """(B, L) p_l(v_l) of tokens when they were decoded: the tokens show which candidate of the last step was committed."""
        if "drawn" not in self.sample:
            return self.sample["probability"]
        committed = self.sample["drawn"] == self.tokens[:, None]
        drawn = torch.where(committed, self.sample["drawn_probability"], 0.0).amax(1)
        return torch.where(committed.any(1), drawn, self.sample["probability"])

    def remember(self, selected: torch.Tensor, values: torch.Tensor, log_probability: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What the next step needs to know, for `Memory.sample`, if the candidates decode `values` (B, N, L) where `selected`."""
        if not self.corrector.remembers:
            return self.sample
        drawn = {
            "probability": self._probability(),
            "drawn": torch.where(selected, values, -1),
            "drawn_probability": log_probability.exp(),
        }
        return {**self.sample, **drawn}
