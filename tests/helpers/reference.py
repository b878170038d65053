"""The formulas of the sampler once more, in plain Python, to hold the package against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def probabilities(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    return [weight / math.fsum(weights) for weight in weights]


def plain_entropy(logits: Sequence[float]) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities(logits) if p > 0)


def plain_kl(logits: Sequence[float], other: Sequence[float]) -> float:
    pairs = zip(probabilities(logits), probabilities(other), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs if p > 0)


def plain_uncertainty(logits: torch.Tensor, masked: torch.Tensor, reduction: str) -> float:
    """𝓗 of one state: `logits` (L, V), `masked` (L,)."""
    values = [plain_entropy(row) for row in logits[masked].double().tolist()]
    return math.fsum(values) / (1 if reduction == "sum" else max(len(values), 1))


def plain_evaluation(
    logits: torch.Tensor, masked: torch.Tensor, next_logits: torch.Tensor | None, next_masked: torch.Tensor, reduction: str
) -> tuple[float, float]:
    """C and IG, in double precision, of the action that leaves `next_masked` (L,) of `masked` (L,)."""
    cost = plain_uncertainty(logits, masked & ~next_masked, "sum")
    if reduction == "kl":
        pairs = [(next_logits[i].double().tolist(), logits[i].double().tolist()) for i in next_masked.nonzero()[:, 0].tolist()]
        return cost, cost + math.fsum(plain_kl(*pair) for pair in pairs)
    after = 0.0 if next_logits is None else plain_uncertainty(next_logits, next_masked, reduction)
    return cost, plain_uncertainty(logits, masked, reduction) - after


def plain_token(logits: Sequence[float], uniform: float, temperature: float) -> int:
    """The inverse of the distribution function, at `uniform`."""
    if temperature == 0:
        return max(range(len(logits)), key=lambda v: logits[v])
    reached = 0.0
    for token, p in enumerate(probabilities([value / temperature for value in logits])):
        reached += p
        if reached > uniform:
            return token
    raise AssertionError("no token holds this share")


def plain_gumbel(uniform: float) -> float:
    return -math.log(-math.log(uniform))


def top_positions(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda position: (-scores[position], position))[:count])


def chi_square_bound(cells: int) -> float:
    """A value that a chi-square statistic of so many cells exceeds with probability below 1e-5 or so."""
    free = cells - 1
    return free + 4.5 * math.sqrt(2 * free) + 14


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
