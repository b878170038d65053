"""Reductions of logits to a few numbers per position, in blocks that stay in the processor's cache.

A row of logits is read once for all that is wanted of it. The kernels of `scoring` work on blocks (R, V) in float32. A `Reader`
copies these out of the model's logits, whatever their precision, so that no float32 copy of all logits is made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import scoring
from .masked_logits import Logits, MaskedLogits

CPU_BLOCK = 1 << 19
"""Logits in a block on the CPU: 2 MB in float32."""
DEVICE_BLOCK = 1 << 25
"""On other devices, where only the memory for float32 copies matters."""


class Statistics(NamedTuple):
    """What one pass over logits (M, V) says of each position, (M,) float32 each.

    Attributes:
        entropy: H_l in nats.
        top: The largest logit.
        log_total: log Σ_v exp(logit_v - top), so that the most probable token has the probability exp(-log_total).
    """

    entropy: torch.Tensor
    top: torch.Tensor
    log_total: torch.Tensor

    def take(self, chosen: torch.Tensor) -> Statistics:
        """Those of some of the positions."""
        return Statistics(*(values[chosen] for values in self))

    @property
    def top_probability(self) -> torch.Tensor:
        """(M,) max_v p_l(v)."""
        return (-self.log_total).exp()

    def log_probability(self, logits: torch.Tensor) -> torch.Tensor:
        """(M, N) log p_l(v) of tokens with these logits (M, N)."""
        return logits - (self.top + self.log_total)[:, None]


class Reader:
    """The logits of M positions, read where they lie, without the mask token.

    Args:
        logits: (..., L, V).
        where: A mask (..., L), or an index (M,) for every dimension of (..., L).
        mask_token_id: Has the logit -inf, if it is one of the V tokens.

    Raises:
        ValueError: If there are no logits at one of the positions.
    """

    def __init__(self, logits: Logits, where: torch.Tensor | tuple[torch.Tensor, ...], mask_token_id: int):
        self.places = where.nonzero(as_tuple=True) if isinstance(where, torch.Tensor) else where
        self.mask_token_id = mask_token_id
        self._source: torch.Tensor
        self._index: tuple[torch.Tensor, ...]
        if isinstance(logits, MaskedLogits):
            self._source, self._index = logits.rows.detach(), (logits.row_index(self.places),)
        elif logits.is_contiguous():
            self._source, self._index = logits.detach().flatten(0, -2), (_flat_index(self.places, logits.shape),)
        else:
            self._source, self._index = logits.detach(), self.places

    def __len__(self) -> int:
        return len(self._index[0])

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._source.shape[-1]

    def take(self, chosen: torch.Tensor) -> Reader:
        """Some of the positions."""
        part = object.__new__(Reader)
        part.places = tuple(index[chosen] for index in self.places)
        part.mask_token_id = self.mask_token_id
        part._source, part._index = self._source, part.places
        if self._index is not self.places:
            part._index = tuple(index[chosen] for index in self._index)
        return part

    def blocks(self) -> Iterator[slice]:
        """The positions in parts that are read together, at least one."""
        size = max((CPU_BLOCK if self._source.device.type == "cpu" else DEVICE_BLOCK) // self.vocab_size, 1)
        if len(self) <= size:
            return iter([slice(None)])
        return (slice(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def buffer(self) -> torch.Tensor:
        """Room for a block. Large tensors that come and go cost more time than what is computed with them."""
        rows = max((part.stop or len(self)) - (part.start or 0) for part in self.blocks())
        return torch.empty(rows, self.vocab_size, dtype=torch.float32, device=self._source.device)

    def read(self, part: slice = slice(None), out: torch.Tensor | None = None) -> torch.Tensor:
        """(R, V) float32, a copy, -inf for the mask token; into the first rows of a `buffer` where that spares memory."""
        index = self._index if part == slice(None) else tuple(index[part] for index in self._index)
        if out is not None and len(index) == 1 and self._source.dtype == torch.float32:
            rows = torch.index_select(self._source, 0, index[0], out=out[: len(index[0])])
        else:
            rows = self._source[index].float()
        if self.mask_token_id < self.vocab_size:
            rows[:, self.mask_token_id] = -torch.inf
        return rows

    def at(self, tokens: torch.Tensor) -> torch.Tensor:
        """(M, N) float32, the logits of tokens (M, N), none of which is the mask token."""
        return self._source[(*(index[:, None] for index in self._index), tokens)].float()

    def check(self, top: torch.Tensor, step_index: int, places: tuple[torch.Tensor, ...] | None = None) -> None:
        """Checks by the largest logit of every position, (M,), that there is something to sample from.

        Args:
            places: How an error names the positions: sample, perhaps candidate, and position, (M,) each; by default the index.

        Raises:
            ValueError: If a logit is NaN or +inf, or all of a position are -inf.
        """
        if math.isfinite(top.sum()):  # waits for the device once
            return
        finite = top.isfinite()
        if not finite.all():  # else their sum overflows
            first = [int(index[~finite][0]) for index in places or self.places]
            place = f"sample {first[0]}, " + (f"candidate {first[1]}, " if len(first) == 3 else "") + f"position {first[-1]}"
            raise ValueError(
                f"`logits` are NaN, +inf or all -inf at step {step_index}, {place}: the model's output cannot be sampled from "
                "(half precision may have overflowed; -inf for single tokens is allowed)."
            )


CompileOptions = tuple[tuple[str, Any], ...]
"""Arguments of `torch.compile` by name."""


@functools.cache
def _compiled(kernel: Callable[..., Any], options: CompileOptions) -> Callable[..., Any]:
    return torch.compile(kernel, **dict(options))


def _kernel(kernel: Callable[..., Any], options: CompileOptions | None) -> Callable[..., Any]:
    """The kernel, fused by `torch.compile` if there are options for it: it then needs no room to work in."""
    return kernel if options is None else _compiled(kernel, options)


def statistics(reader: Reader, options: CompileOptions | None = None) -> Statistics:
    """Entropy, largest logit and normaliser of every position, in one pass; compiled if there are options for it."""
    kernel, buffers = _kernel(scoring.moments, options), [reader.buffer() for _ in range(1 if options else 3)]
    found = []
    for part in reader.blocks():
        rows = reader.read(part, buffers[0])
        found.append(kernel(rows, *(buffer[: len(rows)] for buffer in buffers[1:])))
    return Statistics(*_joined(found))


def log_distributions(reader: Reader) -> torch.Tensor:
    """log p_l(v) of every position, (M, V) float32, finite where p is 0: what `divergences` compares with."""
    return torch.cat([scoring.floored_log_softmax(reader.read(part)) for part in reader.blocks()])


def divergences(
    reader: Reader, before: torch.Tensor, place_before: torch.Tensor, options: CompileOptions | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p_l ‖ q_l) in nats and the largest logit of every position, (M,) each.

    Args:
        before: (K, V), from `log_distributions`.
        place_before: (M,), which of the K distributions each position is compared with.
        options: As in `statistics`.
    """
    kernel, buffers = _kernel(scoring.divergence, options), [reader.buffer() for _ in range(2 if options else 4)]
    found = []
    for part in reader.blocks():
        rows = reader.read(part, buffers[0])
        others = torch.index_select(before, 0, place_before[part], out=buffers[1][: len(rows)])
        found.append(kernel(rows, others, *(buffer[: len(rows)] for buffer in buffers[2:])))
    kl, top = _joined(found)
    return kl, top


def _joined(found: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))


def _flat_index(places: tuple[torch.Tensor, ...], shape: torch.Size) -> torch.Tensor:
    """The rows (M,) of (..., L, V), flattened to (S, V), at an index for every dimension of (..., L)."""
    index = places[0]
    for place, size in zip(places[1:], shape[1:-1], strict=True):
        index = index * size + place
    return index
