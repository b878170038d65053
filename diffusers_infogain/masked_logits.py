"""Logits at masked positions only, so that no memory goes to tokens that are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .checks import check_tensor


class MaskedLogits:
    """Logits at some positions only.

    This is not a tensor. Get single vectors with `rows_at`, states with `take_states`, the full tensor with `dense`.

    Args:
        rows: (M, V), the vectors that exist.
        index: (..., L) long, the row of each position's vector; -1 for positions without one.
    """

    def __init__(self, rows: torch.Tensor, index: torch.Tensor):
        self.rows = rows
        self.index = index

    @classmethod
    def at(cls, where: torch.Tensor, rows: torch.Tensor) -> MaskedLogits:
        """`rows` (M, V) at the M true positions of `where` (..., L), in row-major order.

        Raises:
            ValueError: If there are more or fewer rows.
        """
        if len(rows) != int(where.sum()):
            raise ValueError(f"`rows` must have one row for each of the {int(where.sum())} masked positions, got {len(rows)}.")
        index = torch.full(where.shape, -1, dtype=torch.long, device=where.device)
        index[where] = torch.arange(len(rows), device=where.device)
        return cls(rows, index)

    @property
    def shape(self) -> torch.Size:
        """Of the full tensor, (..., L, V)."""
        return torch.Size((*self.index.shape, self.rows.shape[-1]))

    def rows_at(self, where: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The vectors (K, V) at the K true positions of a mask (..., L), or at an index (K,) for every dimension of (..., L).

        Raises:
            ValueError: If one of them does not exist.
        """
        return self.rows[self.row_index(where)]

    def row_index(self, where: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(K,) long, where in `rows` these vectors are; arguments and errors as those of `rows_at`."""
        index = self.index[where]
        if (index < 0).any():
            raise ValueError("Logits were asked for at a position that was known when the model ran.")
        return index

    def flatten(self) -> MaskedLogits:
        """(B, N, L, V) as (B · N, L, V)."""
        return MaskedLogits(self.rows, self.index.flatten(0, 1))

    def compact(self) -> MaskedLogits:
        """The same without rows that no position refers to, to free their memory."""
        where = self.index >= 0
        return MaskedLogits.at(where, self.rows[self.index[where]])

    def dense(self) -> torch.Tensor:
        """The full tensor, 0 where there are no logits."""
        logits = self.rows.new_zeros(self.shape)
        where = self.index >= 0
        logits[where] = self.rows[self.index[where]]
        return logits


Logits = torch.Tensor | MaskedLogits


def check_logits(name: str, logits: Any) -> None:
    """Raises a ValueError that names the argument if these are no logits."""
    if not isinstance(logits, MaskedLogits):
        check_tensor(name, logits, range(8), "a tensor of real numbers with the tokens in the codebook as its last dimension")
    if logits.shape and logits.shape[-1] == 0:
        raise ValueError(f"`{name}` must have at least one token in the codebook, got the shape {tuple(logits.shape)}.")


def check_logits_of_tokens(logits: Any, tokens: Any) -> None:
    """Raises a ValueError that names the argument if `logits` (B, L, V) are not those of `tokens` (B, L)."""
    check_tensor("tokens", tokens, range(8), "a long tensor (batch, length)", [torch.long])
    check_logits("logits", logits)
    if tokens.ndim != 2 or len(logits.shape) != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"`logits` must have the shape (batch, length, tokens in the codebook) of `tokens` (batch, length), "
            f"got {tuple(logits.shape)} for {tuple(tokens.shape)}."
        )


def concatenate(parts: Sequence[Logits]) -> Logits:
    """States (K, L, V) of several parts, one after the other; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    masked = [part for part in parts if isinstance(part, MaskedLogits)]
    if not masked:
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    index, num_rows = [], 0
    for part in masked:
        index.append(torch.where(part.index < 0, -1, part.index + num_rows))
        num_rows += len(part.rows)
    return MaskedLogits(torch.cat([part.rows for part in masked]), torch.cat(index))


def take_states(logits: Logits, index: torch.Tensor) -> Logits:
    """The states of (K, L, V) at `index`, of any shape; -1 for a state without logits (0 in a full tensor)."""
    if torch.equal(index, torch.arange(logits.shape[0], device=index.device)):
        return logits
    absent = index < 0
    if isinstance(logits, MaskedLogits):
        return MaskedLogits(logits.rows, logits.index[index].masked_fill(absent[..., None], -1)).compact()
    taken = logits[index]
    return taken.masked_fill_(absent[..., None, None], 0) if absent.any() else taken


def split_states(logits: Logits, size: int) -> tuple[Logits, Logits]:
    """The first `size` states of (K, L, V), and the others, without copies; vectors at masks only are in row-major order."""
    if isinstance(logits, torch.Tensor):
        return logits[:size], logits[size:]
    first, rest = logits.index[:size], logits.index[size:]
    num_rows = int((first >= 0).sum())
    rest = torch.where(rest < 0, -1, rest - num_rows)
    return MaskedLogits(logits.rows[:num_rows], first), MaskedLogits(logits.rows[num_rows:], rest)


def replace_states(logits: Logits, index: torch.Tensor, others: Logits) -> Logits:
    """The states of (R, L, V), those at `index` (K,), all different and ascending, replaced by `others` (K, L, V)."""
    if len(index) == logits.shape[0]:
        return others
    source = torch.arange(logits.shape[0], device=index.device)
    source[index] = torch.arange(len(index), device=index.device) + len(source)
    return take_states(concatenate([logits, others]), source)
