"""Models without a network, and plain Python versions of the rules, to hold the package against."""

from __future__ import annotations

import functools
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.token_frequencies import save_token_frequencies

MODULUS = 4099


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_frequencies() -> list[float]:
    """Of 64 tokens; token 2 never occurs."""
    weights = [0 if token == 2 else 1 / (1 + token % 5) ** 3 for token in range(64)]
    return [weight / math.fsum(weights) for weight in weights]


@functools.cache
def _frequencies_folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="frequencies-")
    save_token_frequencies(torch.tensor(plain_frequencies()), Path(folder.name) / "frequencies.safetensors")
    return folder


def frequencies_file() -> str:
    """A file with `plain_frequencies`, gone when the tests have ended."""
    return f"{_frequencies_folder().name}/frequencies.safetensors"


def make_scheduler(mask_token_id: int, steps: int, temperature: float | None = None, **config) -> InfoGainScheduler:
    """A scheduler that follows its schedule alone, with 8 candidates and the gain "sum", where `config` says nothing else."""
    plain = {"num_candidates": 8, "gain_reduction": "sum"}
    if config.get("sampler") != "entropy_bound":
        plain["entropy_bound"] = 0
    if "pc_sampler" in (config.get("sampler"), config.get("certainty")):
        plain["pc_frequencies"] = frequencies_file()
    config = {**plain, **config}
    scheduler = InfoGainScheduler(mask_token_id=mask_token_id, **config)
    scheduler.set_timesteps(steps, temperature)
    return scheduler


class HashModel:
    """Logits that depend on every token of the state and on the sample's condition, bit for bit the same in any batch.

    It keeps the batch sizes of its calls, and all (sample, state) pairs that it was asked for.
    """

    def __init__(self, length: int, num_tokens: int, conditions: Sequence[int] = (0,), seed: int = 0, scale: float = 2.0):
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(MODULUS, generator=generator)
        self.offset = torch.randint(MODULUS, (length, num_tokens), generator=generator)
        self.weights = torch.randint(1, MODULUS, (length,), generator=generator)
        self.conditions = torch.tensor(conditions)
        self.calls: list[int] = []
        self.states: list[tuple[int, tuple[int, ...]]] = []

    def __call__(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(tokens))
        self.states += [(row, tuple(state)) for row, state in zip(rows.tolist(), tokens.tolist(), strict=True)]
        key = ((tokens + 1) * self.weights).sum(-1) + 131 * self.conditions[rows]
        return self.table[(key[:, None, None] + self.offset) % MODULUS]

    def rows_of(self, sample: int) -> int:
        return Counter(row for row, _ in self.states)[sample]


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
