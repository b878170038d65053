"""Schedulers, seeds and a model made of a table, for tests of the sampler."""

from __future__ import annotations

import functools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_infogain import DecodingOutput, InfoGainScheduler
from diffusers_infogain.token_frequencies import save_token_frequencies

MODULUS = 4099


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def partly_known(batch: int, length: int, mask_token_id: int, seed: int = 0, share: float = 0.7) -> torch.Tensor:
    """Random tokens (B, L) of which about `share` are masked, another number in each sample."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(mask_token_id, (batch, length), generator=generator)
    return torch.where(torch.rand(batch, length, generator=generator) < share, mask_token_id, known)


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


EAGER: dict[str, Any] = {
    "certainty": "maskgit",
    "gain_reduction": "kl",
    "top_p": 1.0,
    "lazy_threshold": None,
    "best_run_by": "cumulative_entropy",
}
"""Settings that compare all candidates, of any canvas, and draw from whole distributions."""


def make_scheduler(mask_token_id: int, steps: int, temperature: float | None = None, **config) -> InfoGainScheduler:
    """A scheduler that follows its schedule alone, and compares all of 8 candidates, where `config` says nothing else."""
    plain = EAGER | {"num_candidates": 8, "gain_reduction": "sum"}
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


def assert_the_same_alone(
    run: Callable[..., DecodingOutput],
    scheduler: InfoGainScheduler,
    tokens: torch.Tensor,
    seeds: Sequence[int],
    chunk: int | None,
) -> None:
    """Every sample that `run(scheduler, tokens, seeds)` decodes together in chunks is the same alone, and takes as many rows."""
    together = run(scheduler, tokens, seeds, lookahead_batch_size=chunk)
    for b, seed in enumerate(seeds):
        alone = run(scheduler, tokens[b : b + 1], [seed])
        assert torch.equal(alone.tokens[0], together.tokens[b])
        steps = len(alone.trace.selected)
        assert torch.equal(alone.trace.selected[:, 0], together.trace.selected[:steps, b])
        assert not together.trace.selected[steps:, b].any()
        assert alone.trace.cumulative_entropy[0].item() == pytest.approx(together.trace.cumulative_entropy[b].item(), rel=1e-6)
        more = int(together.trace.num_evaluations[:, b].sum() - alone.trace.num_evaluations.sum())
        # Where tokens are masked again within the steps, a finished sample goes on, and its last candidates are looked at with
        # those of the others, though their costs alone decide.
        masks_within_steps = scheduler.config.corrector in ("remdm_conf", "remdm_loop", "p2")
        assert more >= 0 if scheduler.looks_ahead and masks_within_steps else more == 0
