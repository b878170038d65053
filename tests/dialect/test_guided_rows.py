"""Which rows the transformer sees: guided states two, unguided ones one, and equal ones with equal conditions once."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.dialect import CLASS_FAMILIES, CLIP_FAMILIES, OTHER, PROMPT, WITHOUT_GUIDANCE, call, grid_of, seeded
from helpers.sampling import EAGER

from diffusers_infogain import InfoGainScheduler

INTERVAL_MESSAGE = "`guidance_interval` must be a pair (start, stop) with 0 <= start < stop <= 1, got (1, 0)."


def with_scheduler(pipe, **settings):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **EAGER | settings)
    return pipe


def even(pipe):
    """The pipeline, four of 16 tokens a step."""
    return with_scheduler(pipe, sampler="confidence", entropy_bound=0, tokens_per_step=4)


def rows_by_step(pipe, callback=None, **arguments) -> tuple[list[int], torch.Tensor]:
    """States that went through the transformer in each step, guided and unguided, and the tokens."""
    rows, every = [0], []

    def count(module, args, kwargs) -> None:
        rows[0] += len(args[0] if args else kwargs["input_ids"])

    def after_step(pipe, index, timestep, kwargs):
        every.append(rows[0])
        rows[0] = 0
        return kwargs if callback is None else callback(pipe, index, timestep, kwargs)

    handle = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    output = call(pipe, callback_on_step_end=after_step, **arguments)
    handle.remove()
    return every, output.images


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ({}, [2, 2, 2, 2]),
        ({"guidance_interval": (0.25, 0.75)}, [1, 2, 2, 1]),
        ({"guidance_interval": [0, 0.5]}, [2, 2, 1, 1]),
        ({"guidance_interval": (0.6, 1)}, [1, 1, 1, 2]),
        ({"guidance_schedule": "linear"}, [1, 2, 2, 2]),
        ({"guidance_schedule": "cosine", "guidance_interval": (0, 0.5)}, [1, 2, 1, 1]),
    ],
    ids=str,
)
def test_the_negative_row_is_run_where_guidance_is_on(pipe, how, rows):
    assert rows_by_step(even(pipe), num_inference_steps=4, guidance_scale=3.0, **how)[0] == rows


def test_outside_of_the_interval_images_are_as_without_guidance(pipe, family):
    """The first half unguided: the tokens of the first two steps are those of an unguided call."""
    late, plain, full = [], [], []
    for found, how in (
        (late, {"guidance_scale": 50.0, "guidance_interval": (0.5, 1)}),
        (plain, {"guidance_scale": WITHOUT_GUIDANCE[family]}),
        (full, {"guidance_scale": 50.0}),
    ):

        def keep(pipe, index, timestep, kwargs, found=found):
            found.append(kwargs["latents"].clone())
            return kwargs

        call(even(pipe), num_inference_steps=4, callback_on_step_end=keep, **how)
    assert [torch.equal(a, b) for a, b in zip(late, plain, strict=True)][:2] == [True, True]
    assert not torch.equal(full[-1], plain[-1])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_of_a_prompt_share_the_empty_canvas_and_all_prompts_its_negative_row(pipe, family, scale):
    guided = scale > WITHOUT_GUIDANCE[family]
    make = even(pipe)
    rows, images = rows_by_step(make, num_images_per_prompt=3, generator=seeded(0, 1, 2), guidance_scale=scale)
    assert rows[0] == 1 + guided
    prompts = [PROMPT[family], OTHER[family], PROMPT[family]]
    rows, mixed = rows_by_step(make, prompt=prompts, num_images_per_prompt=2, generator=seeded(*range(6)), guidance_scale=scale)
    assert rows[0] == 2 + guided
    for i, prompt in enumerate(prompts):
        for j in range(2):
            alone = call(make, prompt=prompt, generator=seeded(2 * i + j), guidance_scale=scale).images[0]
            assert torch.equal(mixed[2 * i + j], alone)
    assert torch.equal(images[:2], mixed[:2])


def test_different_negative_prompts_have_rows_of_their_own(pipe, family):
    if family in CLASS_FAMILIES:
        return
    call = {"prompt": [PROMPT[family]] * 2, "negative_prompt": ["", OTHER[family]], "generator": seeded(0, 1)}
    assert rows_by_step(even(pipe), **call, guidance_scale=3.0)[0][0] == 3


def test_known_tokens_that_differ_are_different_canvases(pipe):
    latents = torch.full((3, *grid_of(pipe)), pipe.scheduler.config.mask_token_id)
    latents[1, 0, 0] = 3
    rows, _ = rows_by_step(even(pipe), num_images_per_prompt=3, latents=latents, generator=seeded(0, 1, 2), guidance_scale=3.0)
    assert rows[0] == 4


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 2}, {"num_runs": 2}, {"guided_lookahead": False}, {"guided_lookahead": False, "num_runs": 2}],
    ids=str,
)
def test_an_image_is_the_same_alone_and_among_others_and_every_row_is_counted(pipe, family, chunk, how):
    """Images begin with more or fewer known tokens, so that some are guided and some are not in the same batch."""
    pipe = with_scheduler(pipe, sampler="info_gain", num_candidates=3, entropy_bound=3.0)
    latents = torch.where(torch.arange(16) < 3 * torch.arange(4)[:, None], 1, pipe.scheduler.config.mask_token_id)
    latents = latents.view(4, *grid_of(pipe))
    how = {"num_inference_steps": 8, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.7), "lookahead_batch_size": chunk, **how}
    prompts = [PROMPT[family], OTHER[family]]
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    call_of_all = {"prompt": prompts, "num_images_per_prompt": 2, "latents": latents, "generator": seeded(*range(4))}
    together = call(pipe, **call_of_all, **how)
    handle.remove()
    assert together.trace.num_evaluations.sum() == sum(seen)
    assert together.trace.num_states.sum() < sum(seen)
    for i, image in enumerate(together.images):
        alone = call(pipe, prompt=prompts[i // 2], latents=latents[i : i + 1], generator=seeded(i), **how)
        assert torch.equal(alone.images[0], image)


def test_a_lookahead_without_guidance_takes_a_negative_row_a_step(pipe, family):
    pipe = with_scheduler(pipe, sampler="info_gain", certainty="uniform", entropy_bound=0, tokens_per_step=4)
    trace = call(pipe, num_inference_steps=4, guidance_scale=3.0, guided_lookahead=False).trace
    assert (trace.num_evaluations - trace.num_states).T.tolist() == [[1, 1, 1, 1]]
    assert trace.num_states.sum() > 6
    trace = call(pipe, num_inference_steps=4, guidance_scale=3.0).trace
    assert torch.equal(trace.num_evaluations, 2 * trace.num_states)


def test_a_condition_that_a_callback_changes_in_place_is_not_shared_any_more(pipe, family):
    if family not in CLIP_FAMILIES:
        return

    def begin_again(pipe, index, timestep, kwargs):
        kwargs["prompt_embeds"][0] += 1
        return {"latents": torch.full_like(kwargs["latents"], pipe.scheduler.config.mask_token_id)} if index == 0 else {}

    names = ["latents", "prompt_embeds"]
    rows, _ = rows_by_step(
        even(pipe),
        begin_again,
        callback_on_step_end_tensor_inputs=names,
        num_images_per_prompt=2,
        generator=seeded(0, 1),
        guidance_scale=3.0,
        num_inference_steps=4,
    )
    assert rows[:2] == [2, 3]


def test_images_record_how_they_are_guided(pipe, family):
    how = {"guidance_interval": (0.25, 1), "guided_lookahead": False}
    image = call(pipe, guidance_scale=3.0, **how, output_type="pil").images[0]
    recorded = json.loads(image.info["infogain"])
    assert {name: recorded[name] for name in how} == {"guidance_interval": [0.25, 1], "guided_lookahead": False}
    with pytest.raises(ValueError, match=r"`guided_lookahead` must be True or False, got 'no'\."):
        call(pipe, guided_lookahead="no")
    with pytest.raises(ValueError, match=re.escape(INTERVAL_MESSAGE)):
        call(pipe, guidance_interval=(1, 0))
