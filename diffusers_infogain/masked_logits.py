"""Logits at masked positions only, so that no memory goes to tokens that are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class MaskedLogits:
    """Logits (..., L, V) of which only the rows at some positions exist; it is indexed as the full tensor would be.

    Args:
        rows: (M, V), the rows that exist.
        index: (..., L) long, where in `rows` a position's logits stand; -1 where it has none.
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

    @property
    def ndim(self) -> int:
        """Of the full tensor."""
        return self.index.ndim + 1

    def __getitem__(self, key: Any) -> Any:
        """The rows (K, V) at the K true positions of a mask (..., L), or at K positions given by an index for every dimension of
        (..., L); or logits of some of the states, without a copy.

        Raises:
            ValueError: If a position that has no logits is among them.
        """
        index = self.index[key]
        by_mask = isinstance(key, torch.Tensor) and key.dtype == torch.bool and key.shape == self.index.shape
        if not by_mask and not (isinstance(key, tuple) and len(key) == self.index.ndim):
            return MaskedLogits(self.rows, index)
        if (index < 0).any():
            raise ValueError("Logits were asked for at a position that was known when the model ran.")
        return self.rows[index]

    def flatten(self, start_dim: int, end_dim: int) -> MaskedLogits:
        """As `Tensor.flatten`, for dimensions before the last two."""
        return MaskedLogits(self.rows, self.index.flatten(start_dim, end_dim))

    def compact(self) -> MaskedLogits:
        """The same without the rows that no position refers to, so that their memory is free."""
        where = self.index >= 0
        return MaskedLogits.at(where, self.rows[self.index[where]])

    def dense(self) -> torch.Tensor:
        """The full tensor, 0 where there are no logits."""
        logits = self.rows.new_zeros(self.shape)
        where = self.index >= 0
        logits[where] = self.rows[self.index[where]]
        return logits


Logits = torch.Tensor | MaskedLogits


def concatenate(parts: Sequence[Logits]) -> Logits:
    """States (K, L, V) of several parts behind each other; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    masked = [part for part in parts if isinstance(part, MaskedLogits)]
    if not masked:
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    index, first = [], 0
    for part in masked:
        index.append(torch.where(part.index < 0, -1, part.index + first))
        first += len(part.rows)
    return MaskedLogits(torch.cat([part.rows for part in masked]), torch.cat(index))


def take_states(logits: Logits, places: torch.Tensor) -> Logits:
    """The states of (K, L, V) at `places`, of any shape; -1 for a state without logits (0 in a full tensor)."""
    if torch.equal(places, torch.arange(logits.shape[0], device=places.device)):
        return logits
    absent = places < 0
    if isinstance(logits, MaskedLogits):
        return MaskedLogits(logits.rows, logits.index[places].masked_fill(absent[..., None], -1)).compact()
    taken = logits[places]
    return taken.masked_fill_(absent[..., None, None], 0) if absent.any() else taken
