"""What a rule may look at: a step of some samples, and what is remembered of the steps before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from . import scoring
from .candidates import drawn_from, sample_tokens
from .masked_logits import Logits, take_states
from .reductions import Reader, Statistics, divergences, log_distributions


@dataclass(frozen=True)
class Memory:
    """What a rule carries from one step to the next. Loops hand it on without looking inside.

    Attributes:
        sample: (B, ...) per name: holds for a sample from its first step to its last.
        state: (B, ...) per name: describes the previous state; invalid once a callback has changed the tokens.
    """

    sample: Mapping[str, torch.Tensor] = field(default_factory=dict)
    state: Mapping[str, Logits] = field(default_factory=dict)

    def take(self, sample_index: torch.Tensor) -> Memory:
        """The memory of the samples `sample_index` (K,), which may repeat."""
        sample = {name: value[sample_index.to(value.device)] for name, value in self.sample.items()}
        return Memory(sample, {name: take_states(value, sample_index) for name, value in self.state.items()})

    def without_state(self) -> Memory:
        """The memory after the tokens have been edited."""
        return Memory(self.sample)


class Draws(NamedTuple):
    """The distributions that tokens are drawn from, at M positions.

    Attributes:
        probability: (M, N) of the tokens that are drawn.
        entropy: (M,) in nats.
        margin: (M,) by how much the most probable token leads the second.
    """

    probability: torch.Tensor
    entropy: torch.Tensor
    margin: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a rule may look at: B samples, L positions, M masked positions, N candidates, V tokens.

    Whatever is not in the list of attributes is computed when it is asked for: a rule that does not read `logits` or `tokens`
    spares the copy, or the draw at positions that the step does not decode.

    Attributes:
        reader: The logits of the M positions.
        statistics: What one pass over them says.
        uniforms: (B, N, 2, L) random numbers in [0, 1), for tokens and for positions.
        position_temperature: τ_pos, from the setting that the rule names: (), or (B,) for samples that run ahead of the steps.
        token_temperature, top_p: As tokens are drawn.
        masked: (B, L) bool, where the M positions are.
        allowed: (B, L) bool, the region being decoded.
        grid: (height, width) of the tokens of an image, if given.
        memory: From the previous step.
        config: The scheduler's settings.
        resource: Whatever the rule's `load` returned.
        all_logits: (B, L, V) as the model returned them.
        release: With this probability the schedule has the step decode a token, if each is for itself.
        postponed: Tokens that come last, whatever φ says.
    """

    reader: Reader
    statistics: Statistics
    uniforms: torch.Tensor
    position_temperature: torch.Tensor
    token_temperature: float
    top_p: float
    masked: torch.Tensor
    allowed: torch.Tensor
    grid: tuple[int, int] | None
    memory: Memory
    config: Any
    resource: Any
    all_logits: Logits
    release: float
    postponed: tuple[int, ...] = ()

    def dense(self, values: torch.Tensor, fill: float, where: torch.Tensor | None = None) -> torch.Tensor:
        """(M, N) at the masked positions, or those at `where` (B, L), to (B, N, L), or (M,) to (B, L); `fill` elsewhere."""
        full = values.new_full((*self.masked.shape, *values.shape[1:]), fill)
        full[self.masked if where is None else where] = values
        return full.transpose(1, 2) if full.ndim == 3 else full

    @property
    def entropies(self) -> torch.Tensor:
        """(M,) H_l in nats."""
        return self.statistics.entropy

    @property
    def confidence(self) -> torch.Tensor:
        """(M,) max_v p_l(v); with `certainty_of` = "draws" the probability of the token drawn for the first candidate."""
        return self.draws.probability[:, 0] if self.of_draws else self.statistics.top_probability

    @property
    def of_draws(self) -> bool:
        """Whether rules read the distributions that tokens are drawn from."""
        return bool(self.config.certainty_of == "draws")

    @cached_property
    def draws(self) -> Draws:
        """Of the distributions that tokens are drawn from: τ_token, top-k and top-p applied (only these two at τ_token = 0)."""
        found = []
        for part in self.reader.blocks():
            logits = drawn_from(self.reader.read(part), self.token_temperature, self.config.top_k, self.top_p)
            probability = logits.softmax(-1).gather(-1, self.tokens[part])
            found.append((probability, scoring.entropy(logits), scoring.margin(logits)))
        return Draws(*map(torch.cat, zip(*found, strict=True)))

    @cached_property
    def logits(self) -> torch.Tensor:
        """(M, V) float32, -inf for the mask token."""
        return self.reader.read()

    @cached_property
    def uniform(self) -> torch.Tensor:
        """(M, N) random numbers in [0, 1), for the positions."""
        return self.uniforms[:, :, 1].transpose(1, 2)[self.masked]

    @cached_property
    def temperature(self) -> torch.Tensor:
        """(M, 1) τ_pos."""
        temperature = self.position_temperature.to(self.masked.device)
        return (
            temperature[:, None].expand(self.masked.shape)[self.masked][:, None] if temperature.ndim else temperature.view(1, 1)
        )

    @cached_property
    def tokens(self) -> torch.Tensor:
        """(M, N) long, the tokens v_l drawn for each candidate."""
        return self._draw(self.reader, self.masked)

    @cached_property
    def log_probability(self) -> torch.Tensor:
        """(M, N) log p_l(v_l) of `tokens` at temperature 1."""
        return self.statistics.log_probability(self.reader.at(self.tokens))

    def _draw(self, reader: Reader, where: torch.Tensor) -> torch.Tensor:
        uniform = self.uniforms[:, :, 0].transpose(1, 2)[where]
        settings = self.token_temperature, self.config.top_k, self.top_p
        return torch.cat([sample_tokens(reader.read(part), uniform[part], *settings) for part in reader.blocks()])

    def decoded_at(self, where: torch.Tensor, most_probable: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their log-probabilities at K of the masked positions, (K, N) each.

        Args:
            where: (B, L) bool.
            most_probable: (B, L) bool, where the most probable token replaces the one that was drawn.
        """
        chosen = where[self.masked]
        reader, statistics = self.reader.take(chosen), self.statistics.take(chosen)
        tokens = self.tokens[chosen] if "tokens" in self.__dict__ else self._draw(reader, where)
        if most_probable is not None:
            largest = torch.cat([reader.read(part).argmax(-1, keepdim=True) for part in reader.blocks()])
            tokens = torch.where(most_probable[where][:, None], largest, tokens)
        return tokens, statistics.log_probability(reader.at(tokens))

    @cached_property
    def stable(self) -> torch.Tensor:
        """(M,) bool, KL(p_l now ‖ p_l one step before) < `klass_threshold`; False where there is no step before."""
        stable = torch.zeros_like(self.entropies, dtype=torch.bool)
        if "logits" not in self.memory.state:
            return stable
        # A corrector may have masked a position again, which had no logits, or those of a visible token.
        both = self.masked & self.memory.state["masked"]  # type: ignore[operator]  # a tensor
        before = Reader(self.memory.state["logits"], both, self.config.mask_token_id)
        now = both[self.masked]
        same_place = torch.arange(len(before), device=now.device)
        kl, _ = divergences(self.reader.take(now), log_distributions(before), same_place)
        stable[now] = kl < self.config.klass_threshold
        return stable

    @cached_property
    def stable_steps(self) -> torch.Tensor:
        """(M,) long, the number of consecutive steps, including this one, for which a position has been stable."""
        before = self.memory.state.get("stable_steps")
        count = 0 if before is None else before[self.masked]  # type: ignore[index]  # a tensor
        return torch.where(self.stable, count + 1, 0)
