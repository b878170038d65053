"""Logits of masked language models where they are wanted, and key/value caches for decoding block after block."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .text import TextFamily

CACHES = ("none", "exact", "prefix")


def masked_lm_logits(
    model: PreTrainedModel,
    family: TextFamily,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    where: torch.Tensor,
) -> torch.Tensor:
    """What a model predicts at some positions; only these go through its head.

    Row i of the result predicts token i, whatever the family: outputs of shifted ones are read one position before (at a row's
    first token, which nothing stands before, at the token itself).

    Args:
        input_ids: (R, L) long. Of a block-causal model L may end at any border between blocks: what follows is not seen.
        attention_mask: (R, L) bool, False at padding, on either side; by default there is none. No token sees padding, and
            positions (and so blocks) count from a row's first real token.
        where: (R, L) bool, M positions, none of them padding.

    Returns:
        (M, V), in row-major order, in the model's dtype.
    """
    raise NotImplementedError


class TextCache:
    """Logits of one block after the other, with or without keys and values kept between them.

    One object serves one batch of R rows from the first block to the last:

        cache = TextCache(model, family, kind="exact")
        for start, end in blocks:                                   # columns, left to right
            cache.begin_block(sequences, attention_mask, start, end)
            while masks are left in the block:
                logits = cache.logits(states, rows, where)          # (S, end - start), (S,), (S, end - start) -> (M, V)
            sequences[:, start:end] = decoded                       # begin_block of the next block reads them

    `logits` never changes the cache: any number of states of any rows, in any order, may be asked for. Rows with padding on the
    left or right work with every kind; a block is a range of columns, and may hold prompt tokens and padding.

    Kinds:
        "none": every call runs the whole row (of a block-causal model: up to the end of the block). Every family.
        "exact": block-causal models: keys and values of finished blocks are kept, and a call runs the active block alone. The
            logits are those of "none" up to rounding. Columns that do not coincide with a row's own blocks are still exact: as
            many columns more as it takes are run on either side.
        "prefix": full attention: an approximation. `begin_block` runs the whole rows once and keeps what lies before the block;
            calls run the block and all that follows. The first call of a block, with the tokens that `begin_block` saw, gives the
            logits of "none"; after that the prefix does not see what was decoded in the block.

    Args:
        model, family: As from `load_text_model`.
        kind: One of `CACHES`.
        packed: With "exact": states of one row share one sequence and one copy of the row's keys and values, and see each other
            nowhere. By default every state is a row of a batch, with a copy of its own.

    Raises:
        ValueError: If `kind` is unknown or does not go with the family.
    """

    def __init__(self, model: PreTrainedModel, family: TextFamily, kind: str = "none", packed: bool = False):
        raise NotImplementedError

    def begin_block(self, sequences: torch.Tensor, attention_mask: torch.Tensor | None, start: int, end: int) -> None:
        """Makes columns `start` to `end` (exclusive) the active block.

        Tokens before `start` are final; where they differ from those that were cached, keys and values are computed anew, so blocks
        may also be visited again. The tensors are copied.

        Args:
            sequences: (R, L) long, the whole rows. R and L stay the same from block to block.
            attention_mask: (R, L) bool or None, as in `masked_lm_logits`.

        Raises:
            ValueError: If the columns lie outside, or R or L changed.
        """
        raise NotImplementedError

    def logits(self, states: torch.Tensor, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """What the model predicts if the active block of some rows were other tokens.

        Args:
            states: (S, end - start) long, tokens of the block.
            rows: (S,) long, the row of `sequences` that each stands in; a row may occur any number of times, or not at all.
            where: (S, end - start) bool, the M positions that are wanted.

        Returns:
            (M, V), in row-major order.

        Raises:
            ValueError: If no block was begun, or shapes do not fit.
        """
        raise NotImplementedError

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drops all rows but these, (K,) long; from then on they are rows 0 to K - 1, for `begin_block` too."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Columns whose keys and values are kept; 0 without a cache."""
        raise NotImplementedError
