"""What the settings of a scheduler amount to: its sampler, rule, corrector and objective, and values that they default to."""

from __future__ import annotations

from typing import Any

from .correctors import CORRECTORS, Corrector
from .lookahead import Objective
from .reductions import CompileOptions
from .rules import RULES, SAMPLERS, Rule, Sampler
from .settings import RETRY_LIMITS


class SettingsInUse:
    """Properties of `InfoGainScheduler` that follow from its `config` alone."""

    config: Any
    compile_options: CompileOptions | None

    @property
    def _sampler(self) -> Sampler:
        return SAMPLERS[self.config.sampler]

    @property
    def looks_ahead(self) -> bool:
        """Whether the sampler compares candidates by a lookahead."""
        return self._sampler.looks_ahead and self.config.num_candidates > 1

    @property
    def is_lazy(self) -> bool:
        """Whether it looks at candidates one after the other, until one is good enough; a beam search looks at all of them."""
        return self.looks_ahead and self.objective.weighs_cost and self.config.lazy_threshold is not None

    @property
    def num_compared(self) -> int:
        """N of a proposal: 1 for a greedy sampler."""
        return self.config.num_candidates if self.looks_ahead else 1

    @property
    def entropy_bound(self) -> float:
        """The bound in use, in nats; 0 for none."""
        bound = self.config.entropy_bound
        return self._sampler.entropy_bound if bound is None else bound

    @property
    def top_p(self) -> float:
        """The probability in use; 1 for the whole distribution."""
        return self._sampler.top_p if self.config.top_p is None else self.config.top_p

    @property
    def retries(self) -> bool:
        """Whether unlikely samples are begun anew."""
        return self.config.num_tries > 1 and any(self.config[limit] is not None for limit in RETRY_LIMITS)

    @property
    def corrector(self) -> Corrector:
        """What masks decoded tokens again."""
        return CORRECTORS[self.config.corrector]

    @property
    def rule(self) -> Rule:
        """The φ in use: `certainty`'s for a lookahead sampler, else the sampler's own."""
        return RULES[self._sampler.rule or self.config.certainty]

    @property
    def objective(self) -> Objective:
        """How candidates are compared."""
        config = self.config
        return Objective(
            config.mask_token_id, config.gain_reduction, config.gain_weight, self._sampler.weighs_cost, self.compile_options
        )
