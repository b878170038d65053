"""How long decisions take on random logits, next to one pass over the same logits that computes their entropies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..candidates import Generators
from ..progress import Progress
from ..scheduling_infogain import InfoGainScheduler
from .machine import PeakMemory, wait_for
from .speed import median_and_range

GAINS = ("mean", "sum", "kl")
NUM_STEPS = 12
"""Of the run whose first step is measured: nearly everything is masked then."""


@dataclass(frozen=True)
class Sizes:
    """What is decided on: B samples of L tokens over V codes, with N candidates each."""

    batch_size: int
    length: int
    codebook_size: int
    num_candidates: int


@dataclass
class DecisionTiming:
    """The runs of a decision.

    Attributes:
        name: "propose", or "select" with its gain; "entropies" for a pass over logits.
        num_states: The states whose logits it reads.
        seconds: Of every run.
        of_pass: Seconds of the pass over the entropies of the same logits, in every run.
        megabytes: The most memory of any run beyond what was there before; None where it cannot be told.
    """

    name: str
    num_states: int
    seconds: list[float] = field(default_factory=list)
    of_pass: list[float] = field(default_factory=list)
    megabytes: float | None = None

    @property
    def ratios(self) -> list[float]:
        """The time of every run over that of the pass."""
        return [own / other for own, other in zip(self.seconds, self.of_pass, strict=True)]


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """The entropies (R,) of logits (R, V), as one would write them down: three tensors of that size on the way."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


@torch.no_grad()
def time_decisions(
    sizes: Sizes,
    settings: Mapping[str, Any],
    *,
    num_runs: int,
    seed: int,
    device: str,
    dtype: torch.dtype,
    compiled: bool = False,
) -> list[DecisionTiming]:
    """Times `propose`, and `select` for every gain, in turn with the passes that they are compared with.

    The state is masked completely, and all candidates are compared.

    Args:
        sizes: What is decided on.
        settings: Of the scheduler, besides those that `sizes` and the gain decide.
        num_runs: Of everything, after one that is not counted.
        seed: Of the logits, standard normal, and of the draws.
        device, dtype: Of the logits. The pass reads a copy in float32, which is made before.
        compiled: Whether the scheduler is compiled; the pass never is.
    """
    batch, length, vocabulary, num = sizes.batch_size, sizes.length, sizes.codebook_size, sizes.num_candidates
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, vocabulary, generator=generator, device=device).to(dtype)

    logits, lookahead = random(batch, length), random(batch, num, length)
    tokens = torch.full((batch, length), vocabulary, device=device)
    schedulers = {gain: _scheduler(sizes, {**settings, "gain_reduction": gain}) for gain in GAINS}
    if compiled:
        for scheduler in schedulers.values():
            scheduler.compile()

    def propose(gain: str) -> Any:
        scheduler = schedulers[gain]
        generators: Generators = [torch.Generator().manual_seed(seed + sample) for sample in range(batch)]
        return scheduler.propose(logits, scheduler.timesteps[0], tokens, generator=generators)

    def select(gain: str, proposal: Any) -> Callable[[], Any]:
        return lambda: schedulers[gain].select(lookahead, schedulers[gain].timesteps[0], proposal)

    one, all_states = (value.float().reshape(-1, vocabulary) for value in (logits, lookahead))
    work: list[tuple[DecisionTiming, Callable[[], Any]]] = [
        (DecisionTiming("entropies", batch), lambda: entropies(one)),
        (DecisionTiming("propose", batch), lambda: propose("sum")),
        (DecisionTiming("entropies", batch * num), lambda: entropies(all_states)),
        *((DecisionTiming(f"select, {gain}", batch * num), select(gain, propose(gain))) for gain in GAINS),
    ]
    return _run_in_turn(work, num_runs, device)


def _scheduler(sizes: Sizes, settings: Mapping[str, Any]) -> InfoGainScheduler:
    own = {"num_candidates": sizes.num_candidates, "lazy_threshold": None}
    scheduler = InfoGainScheduler(mask_token_id=sizes.codebook_size, **{**settings, **own})
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


def _run_in_turn(work: Sequence[tuple[DecisionTiming, Callable[[], Any]]], num_runs: int, device: str) -> list[DecisionTiming]:
    of_pass = 0.0
    for run in Progress(range(-1, num_runs), desc="decisions", unit="run"):
        for timing, function in work:
            memory = PeakMemory(device)
            wait_for(device)
            start = time.perf_counter()
            result = function()
            wait_for(device)
            seconds = time.perf_counter() - start
            above = memory.megabytes_above_start()
            del result
            if timing.name == "entropies":
                of_pass = seconds
            if run < 0:
                continue
            timing.seconds.append(seconds)
            timing.of_pass.append(of_pass)
            if above is not None:
                timing.megabytes = max(above, timing.megabytes or 0.0)
    return [timing for timing, _ in work]


def decision_table(timings: Sequence[DecisionTiming]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table, medians with ranges."""
    header = ["decision", "states", "ms", "time / entropies of the same logits", "memory on top (MB)"]
    rows = []
    for timing in timings:
        memory = "–" if timing.megabytes is None else f"{timing.megabytes:,.0f}"
        ratio = "1" if timing.name == "entropies" else median_and_range(timing.ratios)
        rows.append([timing.name, str(timing.num_states), median_and_range(timing.seconds, 1000), ratio, memory])
    return header, rows
