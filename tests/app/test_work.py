"""Requests of the page: bounded, watched, stopped, and the same samples as without the page."""

from __future__ import annotations

import threading

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_infogain import PRESETS, InfoGainScheduler, load
from diffusers_infogain.app import fields, work
from diffusers_infogain.app.work import Job, Jobs, Limits, Request, StoppedError

LIMITS = Limits(steps=20, samples=3, new_tokens=32, waiting=4)


@pytest.fixture(scope="module")
def writer():
    pipe = load("demo-text")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked(pipe, choice: str = "fast", **changes) -> Request:
    settings = fields.base_settings(choice, fields.model_settings(pipe.scheduler))
    return Request(**{"prompt": "a red circle", "seed": 3, "steps": 6, "settings": settings, **changes})


def unwatched(share: float, what: str) -> None:
    return None


def test_a_request_gives_what_the_pipeline_gives(demo_pipe):
    before = demo_pipe.scheduler
    result = work.run(demo_pipe, asked(demo_pipe, samples=2, call={"guidance_scale": 2.0}), LIMITS, Job(), unwatched)
    assert demo_pipe.scheduler is before
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **PRESETS["fast"])
    for image, seed in zip(result.output.images, (3, 4), strict=True):
        alone = pipe("a red circle", num_inference_steps=6, guidance_scale=2.0, generator=torch.Generator().manual_seed(seed))
        differences = np.abs(np.array(image).astype(int) - np.array(alone.images[0]).astype(int))
        assert differences.max() <= 1  # rounding in another batch
    assert result.output.seeds == [3, 4]
    assert not result.stopped
    figures = result.figures
    assert figures["Model rows (NFE)"] == result.trace.num_evaluations.sum().item() / 2
    assert figures["Passes one after the other"] == result.trace.sequential_passes.sum().item() / 2
    assert 0 < figures["Steps"] <= 6
    assert figures["Seconds"] > 0


def test_progress_rises_to_the_end(demo_pipe):
    seen = []
    work.run(demo_pipe, asked(demo_pipe, "maskgit"), LIMITS, Job(), lambda share, what: seen.append((share, what)), "maskgit")
    shares = [share for share, _ in seen]
    assert len(shares) >= 6
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert {what for _, what in seen} == {"maskgit"}


def test_stopping_shows_what_there_is(demo_pipe):
    job = Job()
    result = work.run(demo_pipe, asked(demo_pipe, "maskgit"), LIMITS, job, lambda share, what: job.stop())
    assert result.stopped
    assert result.figures["Steps"] == 1
    assert not job.pipes
    with pytest.raises(StoppedError):
        work.run(demo_pipe, asked(demo_pipe), LIMITS, job, unwatched)


def test_nothing_decoded_is_nothing_to_show(demo_pipe, monkeypatch):
    job, call = Job(), type(demo_pipe).run_call

    def stopped_first(self, arguments):
        output = call(self, arguments)
        output.trace.num_decoded.zero_()
        job.stop()
        return output

    monkeypatch.setattr(type(demo_pipe), "run_call", stopped_first)
    with pytest.raises(StoppedError):
        work.run(demo_pipe, asked(demo_pipe), LIMITS, job, unwatched)


def test_another_thread_stops_a_text(writer):
    jobs = Jobs()
    job, begun, stopped = jobs.begin("visitor"), threading.Event(), threading.Event()

    def watched(share: float, what: str) -> None:
        begun.set()
        stopped.wait(10)

    settings = {**fields.base_settings("confidence", fields.model_settings(writer.scheduler)), "entropy_bound": 0}
    request = Request(prompt="S", seed=0, settings=settings, call={"max_new_tokens": 16, "block_length": 4})
    results = []
    thread = threading.Thread(target=lambda: results.append(work.run(writer, request, LIMITS, job, watched)))
    thread.start()
    assert begun.wait(30)
    assert jobs.stop("visitor")
    stopped.set()
    thread.join(30)
    assert results[0].stopped
    assert results[0].figures["Steps"] < 16


def test_visitors_stop_only_their_own_requests():
    jobs = Jobs()
    one, two = jobs.begin("one"), jobs.begin("two")
    assert jobs.stop("one")
    assert (one.stopped, two.stopped) == (True, False)
    assert not jobs.begin("one").stopped  # a new click
    jobs.end("two")
    assert not jobs.stop("two")
    assert jobs.of("two") is jobs.of("two") is not two
    jobs.stop_all()
    assert jobs.of("one").stopped
    assert jobs.of("two").stopped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "`prompt` must not be empty."),
        ({"prompt": None}, "`prompt` must not be empty."),
        ({"prompt": "a" * 2001}, "`prompt` must have at most 2000 characters, got 2001."),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1."),
        ({"seed": 2**40}, "`seed` must be an integer from 0 to 2147483647, got 1099511627776."),
        ({"samples": 0}, "`samples` must be an integer >= 1, got 0."),
        ({"samples": 4}, "`samples` must be an integer from 1 to 3, got 4."),
        ({"steps": 21}, "`num_inference_steps` must be an integer from 1 to 20, got 21."),
        ({"call": {"guidance_scale": 1000}}, "`guidance_scale` must be a number in [0, 100], got 1000."),
        ({"call": {"max_new_tokens": 33}}, "`max_new_tokens` must be an integer from 0 to 32, got 33."),
    ],
)
def test_requests_are_bounded(demo_pipe, changes, message):
    with pytest.raises(ValueError) as error:
        work.run(demo_pipe, asked(demo_pipe, **changes), LIMITS, Job(), unwatched)
    assert str(error.value) == message


@pytest.mark.parametrize(("value", "got"), [(None, "nothing"), (2.5, "2.5"), ("3", "'3'"), (True, "True"), (float("nan"), "nan")])
def test_number_fields_must_hold_whole_numbers(value, got):
    with pytest.raises(ValueError) as error:
        work.whole("seed", value)
    assert str(error.value) == f"`seed` must be a whole number, got {got}."
    assert work.whole("seed", 3.0) == work.whole("seed", 3) == 3


def test_masks_in_a_prompt_are_filled_in(writer):
    assert work.fills_in(writer, "S12__3___________")
    assert not work.fills_in(writer, "M07*12=")


def test_small_images_are_enlarged_by_whole_factors():
    small = PIL.Image.effect_noise((64, 48), 100)
    large = work.enlarged(small, 512)
    assert large.size == (512, 384)
    assert large.resize(small.size, PIL.Image.Resampling.NEAREST).tobytes() == small.tobytes()
    assert work.enlarged(large, 512) is large
    assert work.enlarged(large, 100) is large


def test_drawn_seeds_are_allowed():
    assert all(0 <= work.random_seed() <= work.LARGEST_SEED for _ in range(20))
