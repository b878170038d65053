"""What callbacks, interfaces and threads do with a pipeline that runs."""

from __future__ import annotations

import inspect
import threading

import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.image_processor import VaeImageProcessor
from helpers.dialect import CLIP_FAMILIES, OTHER, PROMPT, WITHOUT_GUIDANCE, call, grid_of, seeded

from diffusers_infogain import InfoGainScheduler

pytestmark = pytest.mark.filterwarnings("ignore")


def test_threads_share_a_vqvae_in_half_precision(pipe):
    pipe.to(torch.bfloat16)
    expected = [call(pipe, generator=seeded(seed), output_type="pt").images for seed in range(4)]
    wrong, barrier = [], threading.Barrier(4)

    def work(seed: int) -> None:
        for _ in range(4):
            barrier.wait()
            try:
                images = call(pipe, generator=seeded(seed), output_type="pt").images
                wrong.extend([seed] * (not torch.equal(images, expected[seed])))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def greedy(pipe):
    """The pipeline, one state a step."""
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler="confidence", entropy_bound=0)
    return pipe


def rows_by_step(pipe, scale: float, callback=None, **arguments) -> list[int]:
    """States that go through the transformer in each step, guided and unguided."""
    rows, every = [0], []

    def count(module, args, kwargs) -> None:
        tokens = args[0] if args else kwargs["input_ids"]
        rows[0] += len(tokens)

    def after_step(pipe, index, timestep, kwargs):
        every.append(rows[0])
        rows[0] = 0
        return kwargs if callback is None else callback(pipe, index, timestep, kwargs)

    handle = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    call(pipe, guidance_scale=scale, callback_on_step_end=after_step, **arguments)
    handle.remove()
    return every


# Properties of a call


def test_the_properties_of_a_call(pipe, family):
    seen = []
    scale = 1.7

    def look(pipe, index, timestep, kwargs):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps, pipe.interrupt))
        return kwargs

    call(greedy(pipe), guidance_scale=scale, callback_on_step_end=look)
    assert seen == [(scale, True, 3, False)] * 3
    seen.clear()
    call(pipe, guidance_scale=WITHOUT_GUIDANCE[family], callback_on_step_end=look)
    assert seen == [(WITHOUT_GUIDANCE[family], False, 3, False)] * 3


def test_a_call_leaves_the_scheduler_as_it_was(pipe):
    scheduler = pipe.scheduler
    call(pipe)
    assert pipe.scheduler is scheduler
    assert scheduler.timesteps is None


def test_interrupted_calls_end_after_their_step(pipe):
    mask = pipe.scheduler.config.mask_token_id

    def stop(pipe, index, timestep, kwargs):
        pipe._interrupt = index == 1
        return kwargs

    output = call(greedy(pipe), num_inference_steps=8, callback_on_step_end=stop)
    whole = call(pipe, num_inference_steps=8)
    assert len(output.trace.winner) == 2
    left = output.images == mask
    assert left.any()
    assert torch.equal(output.images[~left], whole.images[~left])
    assert pipe.num_timesteps == 8 or pipe.num_timesteps == len(whole.trace.winner)
    assert not pipe.interrupt
    pixels = call(pipe, num_inference_steps=8, callback_on_step_end=stop, output_type="pt").images
    assert pixels.isfinite().all()


def test_another_thread_interrupts_a_call(pipe):
    started = threading.Event()
    ended = threading.Event()

    def wait(pipe, index, timestep, kwargs):
        started.set()
        assert ended.wait(60)
        return kwargs

    def stop() -> None:
        assert started.wait(60)
        pipe._interrupt = True
        ended.set()

    thread = threading.Thread(target=stop)
    thread.start()
    output = call(greedy(pipe), num_inference_steps=8, callback_on_step_end=wait)
    thread.join()
    assert len(output.trace.winner) == 1


def test_a_changed_guidance_scale_counts_from_the_next_step(pipe, family):
    def switch_off(pipe, index, timestep, kwargs):
        if index == 1:
            pipe._guidance_scale = WITHOUT_GUIDANCE[family]
        return kwargs

    assert rows_by_step(greedy(pipe), 2.0, num_inference_steps=4) == [2, 2, 2, 2]
    assert rows_by_step(pipe, 2.0, switch_off, num_inference_steps=4) == [2, 2, 1, 1]
    assert not pipe.do_classifier_free_guidance


def test_callbacks_may_raise_the_guidance_scale_at_every_step(pipe):
    def increase(pipe, index, timestep, kwargs):
        pipe._guidance_scale += 1.0
        return kwargs

    call(pipe, guidance_scale=2.0, callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


# Callbacks


def test_callbacks_get_what_they_ask_for(pipe):
    def subset(pipe, index, timestep, kwargs):
        assert set(kwargs) == {"latents"}
        return kwargs

    call(pipe, callback_on_step_end=subset, callback_on_step_end_tensor_inputs=["latents"])

    def everything(pipe, index, timestep, kwargs):
        assert set(kwargs) == set(pipe._callback_tensor_inputs)
        return kwargs

    call(pipe, callback_on_step_end=everything, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs)

    def change(pipe, index, timestep, kwargs):
        if index == pipe.num_timesteps - 1:
            kwargs["latents"] = torch.zeros_like(kwargs["latents"])
        return kwargs

    images = call(
        greedy(pipe), callback_on_step_end=change, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs
    ).images
    assert images.abs().sum() == 0


@pytest.mark.parametrize("family", CLIP_FAMILIES)
def test_the_callbacks_of_diffusers(pipe):
    class Watch(PipelineCallback):
        tensor_inputs = ["latents"]
        steps: list[int] = []

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            self.steps.append(step_index)
            return callback_kwargs

    cutoff, watch = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1), Watch(cutoff_step_ratio=1.0)
    for callback in (cutoff, MultiPipelineCallbacks([cutoff, watch])):
        output = call(greedy(pipe), num_inference_steps=4, guidance_scale=2.0, callback_on_step_end=callback)
        assert (output.images != pipe.scheduler.config.mask_token_id).all()
        assert pipe.guidance_scale == 0.0
    assert Watch.steps == [0, 1, 2, 3]


def test_unknown_tensor_inputs_are_named(pipe):
    with pytest.raises(ValueError, match=r"`callback_on_step_end_tensor_inputs` must be among latents, .*got \['noise'\]"):
        call(pipe, callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=["noise"])


# Batches and forms of output


def test_images_are_the_same_alone_and_in_a_batch(pipe, family):
    prompts = [PROMPT[family], OTHER[family]]
    output = call(pipe, prompts, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    for row in range(4):
        alone = call(pipe, prompts[row // 2], generator=seeded(row)).images
        assert torch.equal(output.images[row : row + 1], alone)


def test_num_images_per_prompt(pipe, family):
    for count in (1, 2):
        for prompts in ([PROMPT[family]], [PROMPT[family], OTHER[family]]):
            output = call(pipe, prompts, num_images_per_prompt=count, generator=None)
            assert output.images.shape == (count * len(prompts), *grid_of(pipe))


def test_one_generator_and_a_list_of_it(pipe):
    alone, listed = call(pipe, generator=seeded(3)[0]), call(pipe, generator=seeded(3))
    assert torch.equal(alone.images, listed.images)


def test_forms_of_output(pipe):
    forms = {name: call(pipe, output_type=name).images for name in ("pt", "np", "pil", "latent")}
    assert np.allclose(forms["pt"].permute(0, 2, 3, 1).numpy(), forms["np"], atol=1e-6)
    assert np.allclose(VaeImageProcessor.pil_to_numpy(forms["pil"]), forms["np"], atol=1 / 254)
    assert torch.equal(call(pipe, return_dict=False)[0], forms["latent"])
    assert torch.equal(call(pipe)[0], forms["latent"])


def test_a_masked_canvas_is_what_a_call_begins_with(pipe):
    mask = pipe.scheduler.config.mask_token_id
    latents = torch.full((1, *grid_of(pipe)), mask)
    assert torch.equal(call(pipe, latents=latents).images, call(pipe).images)
    latents[..., :2] = 3
    images = call(pipe, latents=latents).images
    assert (images[..., :2] == 3).all()
    assert (images != mask).all()
    assert (latents[..., 2:] == mask).all()


def test_with_and_without_guidance(pipe, family):
    plain, guided = (call(pipe, guidance_scale=scale).images for scale in (WITHOUT_GUIDANCE[family], 7.5))
    assert plain.shape == guided.shape


def test_the_signature_of_a_call(pipe):
    parameters = inspect.signature(type(pipe).__call__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    assert {
        "num_inference_steps",
        "num_images_per_prompt",
        "generator",
        "latents",
        "output_type",
        "return_dict",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "guidance_scale",
        "height",
        "width",
    } <= optional


def test_more_steps_than_masks_are_no_more_work(pipe):
    output = call(greedy(pipe), num_inference_steps=100_000)
    assert len(output.trace.winner) <= 16
    assert (output.images != pipe.scheduler.config.mask_token_id).all()
