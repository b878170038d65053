"""Which rows the transformer sees: guided states two, unguided ones one, and equal ones with equal conditions once."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.dialect import CLIP_FAMILIES, OTHER, PROMPT, WITHOUT_GUIDANCE, call, seeded

from diffusers_infogain import InfoGainScheduler

INTERVAL_MESSAGE = "`guidance_interval` must be a pair (start, stop) with 0 <= start < stop <= 1, got (1, 0)."


def with_scheduler(pipe, **settings):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
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
    if family == "maskgit":
        return
    call = {"prompt": [PROMPT[family]] * 2, "negative_prompt": ["", OTHER[family]], "generator": seeded(0, 1)}
    assert rows_by_step(even(pipe), **call, guidance_scale=3.0)[0][0] == 3


def test_known_tokens_that_differ_are_different_canvases(pipe):
    latents = torch.full((3, 4, 4), pipe.scheduler.config.mask_token_id)
    latents[1, 0, 0] = 3
    rows, _ = rows_by_step(even(pipe), num_images_per_prompt=3, latents=latents, generator=seeded(0, 1, 2), guidance_scale=3.0)
    assert rows[0] == 4


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"num_runs": 2}], ids=str)
def test_an_image_is_the_same_alone_and_among_others_whatever_share_is_decoded_of_them(pipe, family, chunk, search):
    """Images begin with more or fewer known tokens, so that some are guided and some are not in the same batch."""
    pipe = with_scheduler(pipe, sampler="info_gain", num_candidates=3, entropy_bound=3.0)
    latents = torch.where(torch.arange(16) < 3 * torch.arange(4)[:, None], 1, pipe.scheduler.config.mask_token_id).view(4, 4, 4)
    how = {"num_inference_steps": 8, "guidance_scale": 3.0, "guidance_interval": (0.2, 0.7), "lookahead_batch_size": chunk}
    how |= search
    prompts = [PROMPT[family], OTHER[family]]
    call_of_all = {"prompt": prompts, "num_images_per_prompt": 2, "latents": latents, "generator": seeded(*range(4))}
    together = call(pipe, **call_of_all, **how).images
    for i, image in enumerate(together):
        alone = call(pipe, prompt=prompts[i // 2], latents=latents[i : i + 1], generator=seeded(i), **how).images[0]
        assert torch.equal(alone, image)


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


def test_images_record_the_interval(pipe, family):
    image = call(pipe, guidance_scale=3.0, guidance_interval=(0.25, 1), output_type="pil").images[0]
    assert json.loads(image.info["infogain"])["guidance_interval"] == [0.25, 1]
    with pytest.raises(ValueError, match=re.escape(INTERVAL_MESSAGE)):
        call(pipe, guidance_interval=(1, 0))
