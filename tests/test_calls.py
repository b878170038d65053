"""What the calls of all pipelines have in common: seeds, threads, the state of a running call, checks of arguments."""

from __future__ import annotations

import functools
import inspect
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from helpers.amused import make_components
from helpers.checkpoints import make_llama, make_lumina_pipeline, make_mmada_pipeline, make_showo_pipeline, make_word_tokenizer
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.checkpoints_titok import make_maskgen_pipeline, make_titok_pipeline
from helpers.sampling import EAGER, generators

from diffusers_infogain import (
    InfoGainMaskGITPipeline,
    InfoGainMeissonicPipeline,
    InfoGainPipeline,
    InfoGainScheduler,
    InfoGainTextPipeline,
    decode,
)

WORDS, MASK = 24, 22


def make_text_pipeline() -> InfoGainTextPipeline:
    tokenizer = make_word_tokenizer(WORDS, 20, 21)
    tokenizer.pad_token = "<|endoftext|>"
    model = make_llama(WORDS)
    model.config.mask_token_id = MASK
    return InfoGainTextPipeline(model, tokenizer, InfoGainScheduler(MASK, **EAGER, token_temperature=0.9))


MAKERS: dict[str, Callable[[Path], Any]] = {
    "amused": lambda folder: InfoGainPipeline(**make_components()),
    "mmada": lambda folder: make_mmada_pipeline(),
    "showo": lambda folder: make_showo_pipeline(),
    "lumina": lambda folder: make_lumina_pipeline(),
    "maskgit": lambda folder: InfoGainMaskGITPipeline.from_pretrained(write_maskgit_checkpoint(folder)),
    "maskgen": lambda folder: make_maskgen_pipeline(),
    "titok": lambda folder: make_titok_pipeline(default_guidance_schedule="constant"),
    "meissonic": lambda folder: InfoGainMeissonicPipeline.from_pretrained(
        write_meissonic_repository(folder / "repository", True)
    ),
    "text": lambda folder: make_text_pipeline(),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> Callable[[str], Any]:
    @functools.cache
    def make(name: str) -> Any:
        pipe = MAKERS[name](tmp_path_factory.mktemp(name))
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, entropy_bound=0)  # takes all its steps
        return pipe

    return make


@pytest.fixture(params=MAKERS)
def pipe(request, pipelines) -> Any:
    return pipelines(request.param)


def is_text(pipe: Any) -> bool:
    return isinstance(pipe, InfoGainTextPipeline)


def inputs(pipe: Any, number: int = 1, **call: Any) -> dict[str, Any]:
    """A small call of any pipeline, for so many prompts."""
    prompts = ["a cat", "dogs", "the mat on fog", "a red cat", "cats", "fog", "a dog", "on"][:number]
    if is_text(pipe):
        return {"prompt": prompts, "max_new_tokens": 6, "block_length": 3, **call}
    side = {} if pipe.canvas().line else dict.fromkeys(("height", "width"), 4 * pipe.vae_scale_factor)
    prompt = {"class_labels": list(range(number))} if "class_labels" in pipe.recorded_inputs else {"prompt": prompts}
    return {**prompt, **side, "num_inference_steps": 3, "output_type": "latent", **call}


def samples(output: Any) -> list[Any]:
    """What was made, sample by sample, to be compared."""
    return output.texts if hasattr(output, "texts") else output.images.tolist()


# Seeds


def test_one_seed_is_one_sample_however_it_is_given(pipe):
    (one,) = generators(2)
    alone = samples(pipe(**inputs(pipe), generator=one))
    assert samples(pipe(**inputs(pipe), generator=generators(2))) == alone
    copies = {"num_texts_per_prompt" if is_text(pipe) else "num_images_per_prompt": 4}
    (shared,) = generators(2)
    batch = pipe(**inputs(pipe), **copies, generator=shared)
    assert samples(batch)[0] == alone[0]
    assert batch.seeds[0] == 2
    for sample, seed in zip(samples(batch), batch.seeds, strict=True):
        assert samples(pipe(**inputs(pipe), generator=torch.Generator().manual_seed(seed)))[0] == sample
    again = pipe(**inputs(pipe), generator=shared)
    assert again.seeds[0] not in batch.seeds
    assert samples(pipe(**inputs(pipe), generator=generators(*again.seeds))) == samples(again)


def test_without_a_generator_the_seeds_make_the_samples_again(pipe):
    batch = pipe(**inputs(pipe, 3))
    assert samples(pipe(**inputs(pipe, 3), generator=generators(*batch.seeds))) == samples(batch)


@pytest.mark.parametrize("search", [{"num_runs": 2}, {"num_beams": 2}])
def test_searches_tell_seeds_too(pipe, search):
    pipe_with = pipe.scheduler
    pipe.scheduler = InfoGainScheduler.from_config(pipe_with.config, sampler="info_gain", num_candidates=2)
    try:
        (shared,) = generators(5)
        batch = pipe(**inputs(pipe, 2), **search, generator=shared)
        assert samples(pipe(**inputs(pipe, 2), **search, generator=generators(*batch.seeds))) == samples(batch)
    finally:
        pipe.scheduler = pipe_with


# Threads


def test_calls_in_threads_are_each_as_alone(pipe):
    """Eight threads, with prompts, numbers of steps and seeds of their own, on one pipeline."""
    pipe.scheduler.set_timesteps(7)
    before = pipe.scheduler.timesteps
    calls = []
    for number in range(24):
        call = inputs(pipe, 1 + number % 3, generator=number)
        call["num_inference_steps"] = 2 + number % 4
        calls.append(call)
    wait = threading.Barrier(8)

    def run(call: dict[str, Any], together: bool = True) -> Any:
        if together:
            wait.wait()
        one = torch.Generator().manual_seed(call["generator"])
        return samples(pipe(**{**call, "generator": one}))

    alone = [run(call, together=False) for call in calls]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run, calls)) == alone
    assert pipe.scheduler.timesteps is before


def test_prompts_in_threads_are_encoded_as_each_alone(pipelines):
    pipe, wait = pipelines("amused"), threading.Barrier(4)

    def encode(number: int) -> list[tuple[int, ...]]:
        found = []
        with torch.no_grad():
            for _ in range(25):
                wait.wait()
                found.append(tuple(pipe.encode_prompt("a cat" * (number + 1), 1, False)[1].shape))
        return found

    with ThreadPoolExecutor(4) as threads:
        assert {shape for found in threads.map(encode, range(4)) for shape in found} == {(1, 12, 16)}


def test_one_scheduler_serves_threads_that_say_their_steps():
    scheduler = InfoGainScheduler(mask_token_id=9, num_candidates=2)
    table = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))

    def run(steps: int) -> list[int]:
        def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return table.expand(len(tokens), 6, 9) * (1 + (tokens != 9).sum(-1)[:, None, None])

        output = decode(denoise, scheduler, torch.full((2, 6), 9), generator=generators(0, 1), num_inference_steps=steps)
        return output.tokens.tolist()

    alone = [run(1 + number % 6) for number in range(60)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run, [1 + number % 6 for number in range(60)])) == alone
    assert scheduler.timesteps is None


# The state of a running call


def test_the_state_of_a_call_is_read_and_changed_by_its_callback(pipelines):
    pipe = pipelines("amused")
    seen = []

    def more(pipe: Any, index: int, timestep: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt))
        pipe._guidance_scale += 1.0
        return kwargs

    pipe(**inputs(pipe, guidance_scale=2.0, callback_on_step_end=more, generator=generators(0)))
    assert seen == [(2.0 + step, True, False) for step in range(len(seen))]
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps == 2.0 + len(seen)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "text"])
def test_a_changed_guidance_scale_counts_from_the_next_step(name, pipelines):
    """As if the rest had been decoded from what was there by then, with the new scale from the start."""
    pipe = pipelines(name)
    scheduler = pipe.scheduler
    pipe.scheduler = InfoGainScheduler.from_config(scheduler.config, sampler="margin", token_temperature=0.0)
    states = {}

    def keep(pipe: Any, index: int, timestep: torch.Tensor, kwargs: dict[str, Any], scale: float | None = None) -> None:
        states.setdefault(scale, []).append(kwargs["latents"].clone())
        if index == 0 and scale is not None:
            pipe._guidance_scale = scale

    try:
        call = inputs(pipe, 2, guidance_scale=7.0)
        pipe(**call, callback_on_step_end=keep)
        off = 1.0 if name in ("amused", "meissonic") else 0.0
        pipe(**call, callback_on_step_end=functools.partial(keep, scale=off))
        assert torch.equal(states[off][0], states[None][0])
        rest = pipe(**{**call, "guidance_scale": off, "num_inference_steps": 2}, latents=states[None][0])
        # A deterministic rule: each further token is the one that an unguided call chooses in that state.
        first = pipe(**{**call, "guidance_scale": off, "num_inference_steps": 16}, latents=states[off][1])
        changed = states[off][1] != states[None][1]
        assert rest.images.shape == first.images.shape
        assert changed.any()
    finally:
        pipe.scheduler = scheduler


def test_guidance_cannot_begin_in_a_call_that_began_without(pipelines):
    pipe = pipelines("mmada")

    def begin(pipe: Any, *_: Any) -> None:
        pipe._guidance_scale = 3.0

    with pytest.raises(ValueError, match=r"`_guidance_scale` must stay at 0 or below in a call that began so, got 3\.0"):
        pipe(**inputs(pipe, guidance_scale=0.0, callback_on_step_end=begin))


def test_the_cutoff_callback_of_diffusers_ends_guidance(pipelines):
    pipe = pipelines("amused")
    rows = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    scheduler = pipe.scheduler
    pipe.scheduler = InfoGainScheduler.from_config(scheduler.config, sampler="confidence")
    try:
        cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        pipe(**inputs(pipe, guidance_scale=4.0, callback_on_step_end=cutoff))
    finally:
        handle.remove()
        pipe.scheduler = scheduler
    assert rows == [2, 1, 1]
    assert pipe.guidance_scale == 0.0


def test_a_condition_that_a_callback_returns_replaces_the_old_one(pipelines):
    pipe = pipelines("amused")
    names = ["prompt_embeds", "encoder_hidden_states"]
    other = dict(zip(names, pipe.encode_prompt("dogs", 1, False)[:2], strict=True))
    plain = samples(pipe(**inputs(pipe, generator=generators(0), guidance_scale=1.0)))

    def swap(pipe: Any, index: int, timestep: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert set(kwargs) == set(names)
        return other

    call = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": names}
    assert samples(pipe(**inputs(pipe, generator=generators(0), guidance_scale=1.0), **call)) != plain
    call["callback_on_step_end"] = lambda *_: {"prompt_embeds": torch.zeros(3, 16)}
    with pytest.raises(ValueError, match="`callback_on_step_end` must return `prompt_embeds` in its shape, got"):
        pipe(**inputs(pipe), **call)
    call["callback_on_step_end"] = lambda *_: 3
    with pytest.raises(ValueError, match="`callback_on_step_end` must be a function that returns a dictionary or None, got 3"):
        pipe(**inputs(pipe), **call)


def interrupting(after: int) -> Callable[..., Any]:
    def stop(pipe: Any, index: int, timestep: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == after:
            pipe._interrupt = True
        return kwargs

    return stop


def test_an_interrupted_call_ends_with_what_it_has(pipe):
    call = inputs(pipe, 2, generator=generators(0, 1))
    kept = []
    name = "tokens" if is_text(pipe) else "latents"

    def keep(pipe: Any, index: int, timestep: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept.append(kwargs[name].clone())
        return interrupting(0)(pipe, index, timestep, kwargs)

    output = pipe(**call, callback_on_step_end=keep)
    assert pipe.interrupt
    if is_text(pipe):
        assert (output.sequences == pipe.family.mask_token_id).any()
    else:
        assert len(kept) == 1
        assert torch.equal(output.images, kept[0])
        call.update(generator=generators(0, 1), output_type="pt")
        pixels = pipe(**call, callback_on_step_end=interrupting(0)).images
        masked = kept[0] == pipe.scheduler.config.mask_token_id
        if pipe.canvas().line:
            text = [pipe.encode_prompt(call["prompt"])[2]] if "prompt" in call else []
            sketch = pipe.decode_tokens(kept[0][:, 0].masked_fill(masked[:, 0], 0), ~masked[:, 0], *text).clamp(0, 1)
            torch.testing.assert_close(pixels, sketch)
        else:
            cells = masked.repeat_interleave(pipe.vae_scale_factor, 1).repeat_interleave(pipe.vae_scale_factor, 2)
            assert (pixels.movedim(1, -1)[cells] == 0.5).all()
    whole = pipe(**inputs(pipe, 2, generator=generators(0, 1)))
    assert not pipe.interrupt
    assert whole.trace.num_decoded.sum() > output.trace.num_decoded.sum()


def test_another_thread_interrupts_all_running_calls(pipelines):
    pipe, begun = pipelines("amused"), threading.Barrier(3)
    told = threading.Event()

    def hold(pipe: Any, index: int, timestep: torch.Tensor, kwargs: dict[str, Any]) -> None:
        if index == 0:
            begun.wait()
            told.wait()

    def run(seed: int) -> Any:
        return pipe(**inputs(pipe, generator=generators(seed), num_inference_steps=12, callback_on_step_end=hold))

    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(run, seed) for seed in (0, 1)]
        begun.wait()
        pipe._interrupt = True
        told.set()
        assert [len(call.result().trace.winner) for call in calls] == [1, 1]
    assert len(run_alone(pipe).trace.winner) > 1


def run_alone(pipe: Any) -> Any:
    return pipe(**inputs(pipe, generator=generators(0)))


def test_before_the_first_call_there_is_no_state():
    pipe = InfoGainPipeline(**make_components())
    assert not pipe.interrupt
    for name in ("guidance_scale", "num_timesteps", "do_classifier_free_guidance"):
        assert not hasattr(pipe, name)


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried."),
        MemoryError(),
    ],
)
def test_out_of_memory_names_what_lowers_it(pipe, error, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(getattr(pipe, "transformer", None) or pipe.model, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="with 2 samples and `lookahead_batch_size` = 5, the most states"):
        pipe(**inputs(pipe, 2, lookahead_batch_size=5))


# Types of arguments

WRONG = ["x", "", -1, 0, 2.5, 1e308, float("nan"), 2**70, True, None, [], ["x"], [1.5], {}, {"a": 1}, object(), b"x", (1, 2, 3)]
WRONG += [torch.rand(2), torch.ones(1, 1), 1j, "cuda", [None], [[]], -(2**70), range(3)]


def outcome(pipe: Any, call: dict[str, Any]) -> Exception | None:
    try:
        pipe(**call)
    except (ValueError, TypeError) as error:
        return error
    return None


@pytest.mark.parametrize("share", [0.15, pytest.param(1.0, marks=pytest.mark.slow)])
def test_arguments_of_wrong_types_are_named(pipe, share):
    """Whatever a single argument is, the call works or says in one sentence which argument is wrong."""
    chosen = random.Random(type(pipe).__name__)
    parameters = [name for name in inspect.signature(type(pipe).__call__).parameters if name != "self"]
    tried = 0
    for name in parameters:
        for value in chosen.sample(WRONG, round(share * len(WRONG))):
            call = {**inputs(pipe, generator=None), name: value}
            if not is_text(pipe) and name != "num_inference_steps":
                call["num_inference_steps"] = 1
            tried += 1
            error = outcome(pipe, call)
            if error is not None:
                # A required argument that is missing is Python's own TypeError.
                assert name in str(error) if isinstance(error, TypeError) else "`" in str(error), (name, value, error)
                assert "\n" not in str(error)
    assert tried >= share * len(WRONG) * 15


def test_outputs_print_a_few_lines(pipe):
    output = pipe(**inputs(pipe, 2))
    for value in (output, output.trace):
        assert len(repr(value)) < 800
        assert "tensor(" not in repr(value)
    assert "DecodingTrace: 2 samples in" in repr(output)
