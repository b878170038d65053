"""Timings of pipelines: their counts are exact, and their figures follow from what was measured."""

from __future__ import annotations

import re
import time

import pytest
import torch

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.evaluation import decision_speed, speed
from diffusers_infogain.evaluation.decision_speed import DecisionTiming, Sizes, decision_table, time_decisions
from diffusers_infogain.evaluation.machine import PeakMemory, describe_machine, machine_line
from diffusers_infogain.evaluation.speed import NetworkClock, Setting, Timing, time_settings, timing_table
from diffusers_infogain.random_models import random_inputs, random_pipeline


def times(name: str, samplers: dict[str, dict], batch_sizes=(1, 3), num_runs=2, **call) -> list[Timing]:
    pipe = random_pipeline(name)
    own, network = pipe.scheduler, pipe.components.get("transformer") or pipe.model
    settings = [
        Setting(sampler, InfoGainScheduler.from_config(own.config, **chosen), call, size)
        for size in batch_sizes
        for sampler, chosen in samplers.items()
    ]
    timings = time_settings(
        pipe, network, settings, lambda size: random_inputs(pipe, size, 3), num_runs=num_runs, seed=5, device="cpu"
    )
    assert pipe.scheduler is own
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    return timings


PLAIN = {"entropy_bound": 0, "retry_below_sigmas": None}
IMAGES = {"output_type": "latent", "num_inference_steps": 3}


@pytest.mark.parametrize("name", ["amused-nano", "maskgit-nano", "mmada-nano", "showo-nano", "lumina-nano"])
def test_rows_of_images_are_counted_exactly(name):
    greedy = {**PLAIN, "sampler": "confidence"}
    for timing in times(name, {"greedy": greedy, "ahead": {**PLAIN, "lazy_threshold": None}}, **IMAGES):
        size = timing.setting.batch_size
        assert timing.rows == timing.num_evaluations
        assert timing.num_steps == [3, 3]
        assert timing.num_tokens == [16 * size, 16 * size]
        if timing.setting.name == "greedy":
            assert timing.num_states == [3 * size, 3 * size]
            # Guidance runs in one batch, or in a pass of its own.
            assert timing.num_passes == ([3, 3] if name in ("amused-nano", "maskgit-nano") else [6, 6])
            assert timing.num_evaluations == [6 * size - (size - 1)] * 2  # the empty canvas without a prompt is one row
        else:
            assert all(states > 3 * size for states in timing.num_states)
        assert len(timing.seconds) == len(timing.inside) == 2
        assert all(0 < inside < seconds for inside, seconds in zip(timing.inside, timing.seconds, strict=True))


@pytest.mark.parametrize("name", ["amused-nano", "mmada-nano", "showo-nano", "lumina-nano"])
def test_parts_of_rows_are_within_the_network(name):
    for timing in times(name, {"greedy": {**PLAIN, "sampler": "confidence"}}, **IMAGES, approximate_cache="context:0.5"):
        assert timing.rows == timing.num_evaluations
        assert len(timing.seconds) == len(timing.inside) == 2
        assert all(0 < inside < seconds for inside, seconds in zip(timing.inside, timing.seconds, strict=True))


@pytest.mark.parametrize("name", ["llada-nano", "dream-nano", "sdar-nano", "bert-nano"])
def test_rows_of_texts_are_counted_exactly(name):
    for timing in times(name, {"greedy": {**PLAIN, "sampler": "confidence"}}, max_new_tokens=6, cache="none"):
        size = timing.setting.batch_size
        assert timing.num_tokens == [6 * size, 6 * size]
        assert timing.num_evaluations == [6 * size, 6 * size]
        assert timing.rows == timing.num_evaluations


def test_rows_that_only_fill_a_cache_are_told():
    timings = times("sdar-nano", {"greedy": {**PLAIN, "sampler": "confidence"}}, batch_sizes=[2], max_new_tokens=6, cache="exact")
    (timing,) = timings
    # The prompt of 3 tokens lies in the first block, so that of the three blocks two are run again once they are finished.
    assert timing.num_evaluations == [12, 12]
    assert timing.rows == [16, 16]
    told = (
        "The network saw other rows than NFE counts, such as those that only fill a cache, or a batch of a compiled "
        "model: greedy at batch 2 (32 rows, 24 NFE)."
    )
    assert speed.other_rows(timings) == told


def test_settings_take_turns_with_the_same_seeds(monkeypatch):
    order = []

    class Pipeline:
        scheduler = None

        def __call__(self, generator, name, size):
            order.append((name, [one.initial_seed() for one in generator]))
            return inner(**random_inputs(inner, size), generator=generator, **IMAGES)

    inner = random_pipeline("maskgit-nano")
    settings = [Setting(name, inner.scheduler, {"name": name}, size) for name, size in (("a", 1), ("b", 2))]
    pipe = Pipeline()
    time_settings(pipe, inner.transformer, settings, lambda size: {"size": size}, num_runs=2, seed=7, device="cpu")
    assert order == [("a", [7]), ("b", [7, 8]), ("a", [7]), ("b", [7, 8]), ("a", [1007]), ("b", [1007, 1008])]
    assert pipe.scheduler is None


def test_the_clock_measures_the_network_alone():
    class Sleeper(torch.nn.Module):
        def forward(self, input_ids):
            time.sleep(0.02)
            return input_ids

    network = Sleeper()
    clock = NetworkClock(network, "cpu")
    network(torch.zeros(9))
    with clock.running():
        network(torch.zeros(4))
        time.sleep(0.05)
        network(input_ids=torch.zeros(5))
    network(torch.zeros(9))
    assert clock.rows == [4, 5]
    assert 0.04 <= clock.seconds() < 0.07
    clock.reset()
    assert clock.seconds() == 0


def test_on_a_gpu_nothing_waits_within_a_run(monkeypatch):
    """With events and streams that are not real: each event is recorded a millisecond after the one before."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.number = len(recorded)
            recorded.append(stream)

        def elapsed_time(self, end):
            return float(end.number - self.number)

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    network = torch.nn.Identity()
    clock = NetworkClock(network, "cuda:1")
    with clock.running():
        for _ in range(3):
            network(torch.zeros(2))
    assert not waited
    assert recorded == ["stream of cuda:1"] * 6
    assert clock.seconds() == 0.003
    clock.wait()
    assert waited == [torch.device("cuda:1")]


def test_measuring_costs_microseconds():
    assert 0 <= speed.seconds_of_measuring("cpu") < 1e-4


def timing(name: str, size: int, seconds: list[float], inside: list[float]) -> Timing:
    counts = {"num_steps": 10, "num_states": 40, "num_evaluations": 80, "num_lookaheads": 20, "rows": 80, "num_passes": 10}
    lists = {count: [value] * len(seconds) for count, value in {**counts, "num_tokens": 64}.items()}
    return Timing(Setting(name, InfoGainScheduler(8), {}, size), seconds, inside, **lists, peak_megabytes=512.4)


def test_figures_follow_from_the_runs():
    slow, fast = timing("slow", 4, [2.0, 4.0, 3.0], [1.0, 3.0, 2.7]), timing("fast", 4, [1.0, 1.0, 2.0], [0.5, 0.5, 1.0])
    header, rows = timing_table([slow, fast], "image", "fast")
    assert [dict(zip(header, row, strict=True)) for row in rows] == [
        {
            "sampler": name,
            "batch": "4",
            "ms per image": per_image,
            "outside the network (%)": share,
            "ms outside per step": per_step,
            "steps": "10.0",
            "looking ahead": "5.00",
            "NFE": "20.0",
            "rows per s": rows_per_second,
            "peak memory (MB)": "512",
            "time / fast": ratio,
        }
        for name, per_image, share, per_step, rows_per_second, ratio in (
            ("slow", "750 (500 to 1,000)", "25 (10 to 50)", "100 (30 to 100)", "29.6", "2.00 (1.50 to 4.00)"),
            ("fast", "250 (250 to 500)", "50 (50 to 50)", "50 (50 to 100)", "160", "1.00 (1.00 to 1.00)"),
        )
    ]
    assert slow.record()["seconds"] == [2.0, 4.0, 3.0]
    header, (row,) = timing_table([timing("slow", 1, [2.0], [1.5])], "text", None)
    assert header[2] == "s per text"
    assert header[9] == "tokens per s"
    assert row == ["slow", "1", "2.00", "25", "50", "10.0", "20.0", "80.0", "53.3", "32.0", "512"]


def test_columns_of_a_plain_table_are_aligned():
    lines = speed.plain_table(["a", "long"], [["longer", "1"], ["b", "234567"]]).splitlines()
    assert lines == ["a         long", "------  ------", "longer       1", "b       234567"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (99.96, "100.0"), (12345.6, "12,346"), (-0.5, "-0.500")]
)
def test_numbers_have_three_digits(value, text):
    assert speed.shown_number(value) == text


def test_decisions_are_timed_next_to_their_pass():
    sizes = Sizes(batch_size=2, length=9, codebook_size=30, num_candidates=3)
    timings = time_decisions(sizes, {"certainty": "confidence"}, num_runs=2, seed=0, device="cpu", dtype=torch.bfloat16)
    names = ["entropies", "propose", "entropies", "select, mean", "select, sum", "select, kl"]
    assert [timing.name for timing in timings] == names
    assert [timing.num_states for timing in timings] == [2, 2, 6, 6, 6, 6]
    assert all(len(timing.seconds) == len(timing.of_pass) == 2 for timing in timings)
    assert timings[3].of_pass == timings[2].seconds
    assert timings[1].of_pass == timings[0].seconds
    header, rows = decision_table([DecisionTiming("select, sum", 8, [0.3, 0.1, 0.2], [0.1, 0.1, 0.1], 12.6)])
    assert header == ["decision", "states", "ms", "time / entropies of the same logits", "memory on top (MB)"]
    assert rows == [["select, sum", "8", "200 (100 to 300)", "2.00 (1.00 to 3.00)", "13"]]


def test_the_pass_computes_entropies():
    logits = torch.randn(3, 5)
    p = logits.double().softmax(-1)
    torch.testing.assert_close(decision_speed.entropies(logits).double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)


def test_peak_memory_sees_what_was_freed():
    memory = PeakMemory("cpu")
    if memory.megabytes() is None:
        pytest.skip("the peak is known on Linux only")
    large = torch.ones(50_000_000)
    del large
    assert memory.megabytes_above_start() > 190
    assert PeakMemory("cpu").megabytes_above_start() < 50


def test_the_machine_is_named():
    line = machine_line(describe_machine("cpu", "float32"))
    assert re.fullmatch(
        r".+, \d+ threads? of \d+ cores, \w+ \w+, float32; Python [\d.]+, torch \S+, diffusers \S+, transformers \S+, "
        r"diffusers_infogain \S+\.",
        line,
    )
