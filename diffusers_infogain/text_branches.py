"""What the network reads of the texts of a call: what is written and, with guidance, what the texts are steered away from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .denoising import Denoised
from .guidance import Rows, first_of_equal
from .masked_logits import MaskedLogits, take_states
from .models.text_logits import TextCache


class TextBranch:
    """Logits of the texts of a batch, block by block. Equal states of texts that are equal so far share a row of the network.

    Args:
        pipe: The pipeline.
        mode: Of the cache.
        packed: As in `TextCache`.
        batch_size: Number of texts.
    """

    def __init__(self, pipe: Any, mode: str, packed: bool, batch_size: int):
        self._cache = TextCache(pipe.model, pipe.family, mode, packed=packed)
        self._exact = mode == "exact"
        self._in_cache = torch.arange(batch_size, device=pipe._execution_device)
        self._cached = False
        self._kind = self._cache_index = self._in_cache
        self._may_share = False

    def begin(self, tokens: torch.Tensor, attention_mask: torch.Tensor, sample_index: torch.Tensor, start: int, end: int) -> None:
        """Makes columns `start` to `end` (exclusive) of the texts `sample_index` (R,) the active block.

        Args:
            tokens, attention_mask: (B, L) of all texts.
        """
        # Texts that are equal so far (of one prompt, say) are told the same of equal states.
        first, self._kind = first_of_equal(torch.cat([tokens[sample_index], attention_mask[sample_index].long()], dim=1))
        # Only the exact cache keeps something from block to block, and so has to hold all texts, those of the other groups, too.
        in_cache = self._in_cache if self._exact else sample_index[first]
        self._cache.begin_block(tokens[in_cache], attention_mask[in_cache], start, end)
        self._cached = True
        self._cache_index = torch.searchsorted(in_cache, sample_index[first])[self._kind]
        self._may_share = len(first) < len(sample_index)

    def logits(
        self, states: torch.Tensor, sample_index: torch.Tensor, where: torch.Tensor, keys: torch.Tensor | None = None
    ) -> Denoised:
        """`MaskedLogits` of states (R, L) of the block, in row-major order, and the rows that each took.

        Args:
            sample_index: (R,) long, numbers among the texts of the block.
            where: (R, L) bool, the positions that are wanted.
            keys: (R, L), equal for states that are equal and wanted at the same positions; by default the states.
        """
        if not self._may_share:
            logits = MaskedLogits.at(where, self._cache.logits(states, self._cache_index[sample_index], where))
            return Denoised(logits, torch.ones_like(sample_index))
        rows = Rows.of(states if keys is None else keys, self._kind[sample_index])
        where = where[rows.state]
        found = self._cache.logits(states[rows.state], self._cache_index[sample_index[rows.state]], where)
        return Denoised(take_states(MaskedLogits.at(where, found), rows.number), rows.count)

    def keep_only(self, running: torch.Tensor) -> None:
        """Takes all texts but those with the numbers `running` (K,) out of the exact cache."""
        if self._exact and len(running) < len(self._in_cache):
            if self._cached:
                self._cache.keep_samples(torch.searchsorted(self._in_cache, running))
            self._in_cache = running


@dataclass
class AwayTexts:
    """The texts that guidance steers away from: with other prompts, and the same new tokens.

    Attributes:
        branch: Runs them.
        given: (B, L') long, their prompts and padding.
        fixed: (B, L') bool, where these stay; elsewhere are the tokens of the texts that are written.
        attention_mask: (B, L') bool.
        offset: L' - L: the column of a token less that in the text that is written.
    """

    branch: TextBranch
    given: torch.Tensor
    fixed: torch.Tensor
    attention_mask: torch.Tensor
    offset: int
    begun: bool = False

    def begin(self, tokens: torch.Tensor, sample_index: torch.Tensor, start: int, end: int) -> None:
        """As of `TextBranch`, from the texts (B, L) that are written."""
        columns = (torch.arange(self.given.shape[1], device=tokens.device) - self.offset).clamp(min=0)
        texts = torch.where(self.fixed, self.given, tokens[:, columns])
        start, end = start + self.offset, end + self.offset
        self.branch.begin(texts, self.attention_mask, sample_index, start, end)
        self._fixed, self._given = self.fixed[sample_index, start:end], self.given[sample_index, start:end]
        self.begun = True

    def logits(self, states: torch.Tensor, sample_index: torch.Tensor, where: torch.Tensor) -> Denoised:
        """As of `TextBranch`, of the states (R, L) that are written."""
        fixed = self._fixed[sample_index]
        away = torch.where(fixed, self._given[sample_index], states)
        # What is wanted is not to be told from the masks of a prompt by the state alone.
        return self.branch.logits(away, sample_index, where, away.masked_fill(fixed, -1))
