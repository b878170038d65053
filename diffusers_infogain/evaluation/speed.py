"""How long decoding takes, inside and outside the network: runs that alternate between settings, and their table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..candidates import Generators
from ..progress import Progress
from ..scheduling_infogain import InfoGainScheduler
from .machine import PeakMemory, wait_for

SEEDS_BETWEEN_RUNS = 1000


class NetworkClock:
    """Measures the passes through a network while it is `running`, by hooks that change nothing.

    On a CUDA GPU the hooks only mark the stream with events, so that nothing waits for it; elsewhere they read the clock. A call
    of the pipeline's `run_rows`, by which approximate caches run parts of the network, counts as a pass.

    Args:
        network: The module that is called.
        device: Where it runs.
        pipe: The pipeline that it belongs to.

    Attributes:
        rows: States in every pass since `reset`, the first dimension of its input.
    """

    def __init__(self, network: torch.nn.Module, device: str | torch.device, pipe: Any = None):
        self.network = network
        self.pipe = pipe
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forgets all passes."""
        self._depth = 0
        self.rows: list[int] = []
        self._begun: list[Any] = []
        self._ended: list[Any] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measures the passes within the block."""
        handles = [
            self.network.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.network.register_forward_hook(self._end),
        ]
        run_rows = getattr(self.pipe, "run_rows", None)

        def measured(tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
            self._begin(None, (tokens,), {})
            logits = run_rows(tokens, *arguments)  # type: ignore[misc]
            self._end()
            return logits

        if run_rows is not None:
            self.pipe.run_rows = measured
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if run_rows is not None:
                del self.pipe.run_rows

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        """Waits for a GPU to finish."""
        wait_for(self.device)

    def _begin(self, module: Any, arguments: Any, named: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self.rows.append(len(arguments[0] if arguments else named["input_ids"]))
            self._begun.append(self._now())

    def _end(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._ended.append(self._now())

    def seconds(self) -> float:
        """The time inside, over all passes; on a GPU only after it has been waited for."""
        pairs = zip(self._begun, self._ended, strict=True)
        if self.on_cuda:
            return sum(begun.elapsed_time(ended) for begun, ended in pairs) / 1000
        return sum(ended - begun for begun, ended in pairs)


def seconds_of_measuring(device: str, passes: int = 1000) -> float:
    """What a `NetworkClock` adds to a pass, in seconds, measured on a network that does nothing."""
    network, value = torch.nn.Identity(), torch.zeros(1)
    clock = NetworkClock(network, device)

    def of_all() -> float:
        start = time.perf_counter()
        for _ in range(passes):
            network(value)
        return time.perf_counter() - start

    of_all()
    without = min(of_all() for _ in range(3))
    with clock.running():
        measured = min(of_all() for _ in range(3))
    return max(measured - without, 0.0) / passes


@dataclass(frozen=True)
class Setting:
    """What is timed: a sampler, with arguments of the pipeline's call.

    Attributes:
        name: In tables.
        scheduler: The sampler.
        call: Arguments of the call besides the prompts, the same for all runs.
        batch_size: Images or texts decoded together.
    """

    name: str
    scheduler: InfoGainScheduler
    call: dict[str, Any]
    batch_size: int


@dataclass
class Timing:
    """The runs of a setting.

    Attributes:
        seconds: Of every run.
        inside: Seconds of each within the network.
        num_steps: Of each: steps of the batch.
        num_states: Of each: states that went through the network, over all samples.
        num_evaluations: Of each: NFE, the rows of the network that this took, by the trace.
        num_lookaheads: Of each: steps in which a sample compared candidates, over all samples.
        rows: Of each: the rows that the network saw.
        num_passes: Of each: calls of the network.
        num_tokens: Of each: tokens decoded, over all samples.
        peak_megabytes: Most memory in any run; None where it cannot be told.
    """

    setting: Setting
    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    num_steps: list[int] = field(default_factory=list)
    num_states: list[int] = field(default_factory=list)
    num_evaluations: list[int] = field(default_factory=list)
    num_lookaheads: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    num_passes: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    peak_megabytes: float | None = None

    @property
    def per_sample(self) -> list[float]:
        """Seconds of an image or text, in each run."""
        return [seconds / self.setting.batch_size for seconds in self.seconds]

    @property
    def share_outside(self) -> list[float]:
        """The share of each run's time that is spent outside the network."""
        return [1 - inside / seconds for inside, seconds in zip(self.inside, self.seconds, strict=True)]

    @property
    def outside_per_step(self) -> list[float]:
        """Seconds outside the network in a step of the batch, in each run."""
        return [
            (seconds - inside) / max(steps, 1)
            for inside, seconds, steps in zip(self.inside, self.seconds, self.num_steps, strict=True)
        ]

    @property
    def rows_per_second(self) -> list[float]:
        """Rows that went through the network in a second within it, in each run."""
        return [rows / inside for rows, inside in zip(self.rows, self.inside, strict=True)]

    @property
    def tokens_per_second(self) -> list[float]:
        """Tokens decoded in a second, over all samples, in each run."""
        return [tokens / seconds for tokens, seconds in zip(self.num_tokens, self.seconds, strict=True)]

    def ratios(self, other: Timing) -> list[float]:
        """The time of each run over that of the other setting's run of the same number, which had the same seeds."""
        return [own / against for own, against in zip(self.seconds, other.seconds, strict=True)]

    def record(self) -> dict[str, Any]:
        """Everything measured, for JSON."""
        measured = {name: value for name, value in vars(self).items() if name != "setting"}
        return {"name": self.setting.name, "batch_size": self.setting.batch_size, **measured}


def time_settings(
    pipe: Any,
    network: torch.nn.Module,
    settings: Sequence[Setting],
    inputs: Callable[[int], dict[str, Any]],
    *,
    num_runs: int,
    seed: int,
    device: str,
) -> list[Timing]:
    """Runs settings in turn, so that changes of the machine's load affect all of them, after a run of each that is not counted.

    Args:
        pipe: A pipeline of images or texts; its scheduler is replaced while this runs.
        network: The part of it that `NetworkClock` measures.
        settings: What is timed.
        inputs: The prompts, as arguments of the call, for a batch of a size.
        num_runs: Of every setting.
        seed: Of the first sample. All settings have the same seeds in a run.
        device: Where the pipeline is.
    """
    timings = [Timing(setting) for setting in settings]
    arguments = {size: inputs(size) for size in dict.fromkeys(setting.batch_size for setting in settings)}
    clock = NetworkClock(network, device, pipe)
    own = pipe.scheduler
    turns = [(run, timing) for run in range(-1, num_runs) for timing in timings]
    try:
        with clock.running():
            for run, timing in Progress(turns, desc="benchmark", unit="run"):
                size = timing.setting.batch_size
                first = seed + SEEDS_BETWEEN_RUNS * max(run, 0)
                generators: Generators = [torch.Generator().manual_seed(first + index) for index in range(size)]
                pipe.scheduler = timing.setting.scheduler
                _time_run(pipe, clock, timing, {**arguments[size], **timing.setting.call, "generator": generators}, run >= 0)
    finally:
        pipe.scheduler = own
    return timings


def _time_run(pipe: Any, clock: NetworkClock, timing: Timing, arguments: dict[str, Any], counts: bool) -> None:
    clock.reset()
    memory = PeakMemory(clock.device)
    clock.wait()
    start = time.perf_counter()
    output = pipe(**arguments)
    clock.wait()
    seconds = time.perf_counter() - start
    if not counts:
        return
    trace = output.trace
    timing.seconds.append(seconds)
    timing.inside.append(clock.seconds())
    timing.num_steps.append(len(trace.winner))
    timing.num_states.append(int(trace.num_states.sum()))
    timing.num_evaluations.append(int(trace.num_evaluations.sum()))
    timing.num_lookaheads.append(int((trace.num_compared > 0).sum()))
    timing.rows.append(sum(clock.rows))
    timing.num_passes.append(len(clock.rows))
    timing.num_tokens.append(int((trace.decoded_at >= 0).sum()))
    peak = memory.megabytes()
    if peak is not None:
        timing.peak_megabytes = max(peak, timing.peak_megabytes or 0.0)


def median_and_range(values: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """The median with the smallest and largest value, in as many significant digits."""
    low, middle, high = (shown_number(scale * value, digits) for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def shown_number(value: float, digits: int = 3) -> str:
    """A number with that many significant digits, without an exponent."""
    if value == 0:
        return "0"
    places = digits - 1 - _exponent(value)
    return f"{value:,.{max(places, 0)}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def timing_table(timings: Sequence[Timing], unit: str, against: str | None) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table of timings, medians with ranges, one sample's figures unless they say otherwise.

    Args:
        unit: "image" or "text".
        against: The name of the setting that the others are compared with, at each batch size.
    """
    fast = max(statistics.median(timing.per_sample) for timing in timings) < 1
    scale, second = (1000, "ms") if fast else (1, "s")
    header = [
        "sampler",
        "batch",
        f"{second} per {unit}",
        "outside the network (%)",
        "ms outside per step",
        "steps",
        "looking ahead",
        "NFE",
    ]
    header += ["rows per s", *(["tokens per s"] if unit == "text" else []), "peak memory (MB)"]
    header += [f"time / {against}"] if against is not None else []
    rows = []
    for timing in timings:
        size = timing.setting.batch_size
        row = [timing.setting.name, str(size), median_and_range(timing.per_sample, scale)]
        row += [median_and_range(timing.share_outside, 100, 2), median_and_range(timing.outside_per_step, 1000, 2)]
        row.append(shown_number(statistics.mean(timing.num_steps)))
        row += [shown_number(statistics.mean(counts) / size) for counts in (timing.num_lookaheads, timing.num_evaluations)]
        row.append(shown_number(statistics.median(timing.rows_per_second)))
        row += [shown_number(statistics.median(timing.tokens_per_second))] if unit == "text" else []
        row.append("–" if timing.peak_megabytes is None else f"{timing.peak_megabytes:,.0f}")
        if against is not None:
            row.append(median_and_range(timing.ratios(find_timing(timings, against, size))))
        rows.append(row)
    return header, rows


def find_timing(timings: Sequence[Timing], name: str, batch_size: int) -> Timing:
    """The timing of a setting by name and batch size."""
    return next(timing for timing in timings if (timing.setting.name, timing.setting.batch_size) == (name, batch_size))


def other_rows(timings: Sequence[Timing]) -> str | None:
    """A sentence about the settings in which the network saw other rows than the trace counts, or None."""
    found = [
        f"{timing.setting.name} at batch {timing.setting.batch_size} ({sum(timing.rows)} rows, {sum(timing.num_evaluations)} NFE)"
        for timing in timings
        if timing.rows != timing.num_evaluations
    ]
    if not found:
        return None
    why = "such as those that only fill a cache, or a batch of a compiled model"
    return f"The network saw other rows than NFE counts, {why}: {', '.join(found)}."


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for terminals: the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([aligned(header), "  ".join("-" * width for width in widths), *map(aligned, rows)])
