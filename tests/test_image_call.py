"""One call of an image pipeline, and the signatures of all families' calls."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_infogain import (
    InfoGainLuminaPipeline,
    InfoGainMaskGITPipeline,
    InfoGainMeissonicPipeline,
    InfoGainMMaDAPipeline,
    InfoGainPipeline,
    InfoGainScheduler,
    InfoGainShowoPipeline,
)
from diffusers_infogain.image_call import CALL_OPTIONS, Canvas, ImageCall
from diffusers_infogain.image_pipeline import InfoGainImagePipeline
from diffusers_infogain.loading import IMAGE_PIPELINES

MASK = 10
OPTIONS = {name: inspect.signature(InfoGainImagePipeline.__call__).parameters[name].default for name in CALL_OPTIONS}


def make_call(
    num_prompts: int = 2,
    tensor_inputs: tuple[str, ...] = ("latents",),
    offset: int = 0,
    scheduler: InfoGainScheduler | None = None,
    inputs: dict[str, Any] | None = None,
    **options: Any,
) -> ImageCall:
    pipe = SimpleNamespace(
        canvas=lambda: Canvas(codebook_size=10, vocab_size=11, side=4, multiple=2),
        scheduler=scheduler or InfoGainScheduler(mask_token_id=MASK),
        vqvae=object(),
        _encode_pixels=lambda pixels: torch.zeros(len(pixels), *(side // 8 for side in pixels.shape[2:]), dtype=torch.long),
        vae_scale_factor=8,
        guidance_offset=offset,
        further_scales=tuple(inputs or {}),
        default_num_inference_steps=5,
        _callback_tensor_inputs=["latents", *tensor_inputs],
        _execution_device=torch.device("cpu"),
        scheduler_for_call=lambda scheduler: scheduler,
    )
    return ImageCall(
        pipe=pipe,
        inputs=inputs or {},
        num_prompts=num_prompts,
        **{**OPTIONS, "guidance_scale": 3.0, "guidance_schedule": "constant", **options},
    )


def test_the_options_of_a_call_are_the_arguments_of_the_base_class():
    assert [name for name in inspect.signature(InfoGainImagePipeline.__call__).parameters if name in CALL_OPTIONS] == list(
        CALL_OPTIONS
    )
    assert {*inspect.signature(InfoGainImagePipeline.__call__).parameters} - {*CALL_OPTIONS} == {
        "self",
        "prompt",
        "negative_prompt",
    }


EMBEDDINGS = ["prompt_embeds", "encoder_hidden_states", "negative_prompt_embeds", "negative_encoder_hidden_states"]
MICRO = ["micro_conditioning_aesthetic_score", "micro_conditioning_crop_coord"]
SIZE, IMAGES, OUTPUT = list(CALL_OPTIONS[:7]), list(CALL_OPTIONS[7:10]), list(CALL_OPTIONS[10:-10])
TASK = ["task", "style_image", "image_guidance_scale"]
LAST = list(CALL_OPTIONS[-10:])
"""Searches, then editing, then the cache."""


@pytest.mark.parametrize(
    ("pipeline", "order"),
    [
        (InfoGainMMaDAPipeline, ["prompt", *SIZE, "negative_prompt", *IMAGES, *OUTPUT, *LAST]),
        (InfoGainShowoPipeline, ["prompt", *SIZE, "negative_prompt", *IMAGES, *OUTPUT, *LAST]),
        (InfoGainLuminaPipeline, ["prompt", *SIZE, "negative_prompt", *IMAGES, *OUTPUT, *LAST, *TASK]),
        (InfoGainMaskGITPipeline, ["class_labels", *SIZE, *IMAGES, *OUTPUT, *LAST]),
        (InfoGainMeissonicPipeline, ["prompt", *SIZE, "negative_prompt", *IMAGES, *EMBEDDINGS, *OUTPUT, *MICRO, *LAST]),
        (
            InfoGainPipeline,
            ["prompt", *SIZE, "negative_prompt", *IMAGES, *EMBEDDINGS, *OUTPUT, "cross_attention_kwargs", *MICRO, *LAST],
        ),
    ],
)
def test_arguments_of_every_family_stand_in_their_order_with_the_defaults_of_all(pipeline, order):
    parameters = inspect.signature(pipeline.__call__).parameters
    assert [name for name in parameters if name != "self"] == order
    assert {name: parameters[name].default for name in CALL_OPTIONS} == OPTIONS


@pytest.mark.parametrize("pipeline", IMAGE_PIPELINES, ids=lambda pipeline: pipeline.__name__)
def test_help_describes_every_argument_of_every_family(pipeline):
    described = inspect.getdoc(pipeline.__call__)
    for name in inspect.signature(pipeline.__call__).parameters:
        assert name == "self" or f" {name}:" in described or f" {name}, " in described, name


def test_sizes_and_steps_by_default():
    call = make_call()
    assert (call.height, call.width, call.grid, call.batch_size) == (32, 32, (4, 4), 2)
    assert len(call.scheduler.timesteps) == call.state.num_timesteps == 5
    assert torch.equal(call.start_tokens(), torch.full((2, 16), MASK))
    latents = torch.full((2, 2, 6), MASK)
    latents[0, 0] = 3
    known = make_call(latents=latents)
    assert (known.height, known.width, known.grid) == (16, 48, (2, 6))
    assert torch.equal(known.start_tokens(), latents.flatten(1))


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 5), (0.01, 1), (0.99, 9)])
def test_image_to_image_takes_its_share_of_the_steps(strength, steps):
    call = make_call(image=torch.zeros(3, 32, 32), strength=strength, num_inference_steps=10)
    assert len(call.scheduler.timesteps) == steps
    assert call.num_inference_steps == 10
    assert (call.start_tokens() == MASK).sum(1).tolist() == [max(1, round(16 * strength))] * 2


def test_padding_must_fit_the_units_of_the_model():
    assert make_call(image=torch.zeros(3, 32, 32), outpaint={"left": 8, "right": 8}).grid == (4, 6)
    message = r"`height` and `width` must be positive multiples of 16, got 32 and 40, with the padding of `outpaint`\."
    with pytest.raises(ValueError, match=message):
        make_call(image=torch.zeros(3, 32, 32), outpaint={"left": 8})


def test_at_a_fixed_pace_an_edit_takes_the_steps_of_its_tokens():
    call = make_call(image=torch.zeros(3, 32, 32), scheduler=InfoGainScheduler(mask_token_id=MASK, tokens_per_step=2))
    assert (call.start_tokens() == MASK).sum(1).tolist() == [8, 8]
    assert len(call.scheduler.timesteps) == 4


def test_values_per_image():
    call = make_call(num_prompts=2, num_images_per_prompt=3)
    assert call.per_image("a") == ["a"] * 6
    assert call.per_image(["a"]) == ["a"] * 6
    assert call.per_image(("a", "b")) == ["a", "a", "a", "b", "b", "b"]
    assert make_call(num_prompts=1).per_image(7) == [7]


def test_conditions_are_taken_by_image_as_callbacks_left_them():
    call = make_call(tensor_inputs=("words", "negative_words"))
    words, negative = torch.tensor([1, 2]), torch.tensor([3, 4])
    call.condition_on({"words": words, "size": torch.tensor([5, 5])}, {"words": negative, "size": torch.tensor([6, 6])})
    assert list(call.state.conditions) == ["words", "negative_words"]  # a callback may not read or replace the size
    index = torch.tensor([1, 1, 0])
    assert {name: value.tolist() for name, value in call.condition(index).items()} == {"words": [2, 2, 1], "size": [5, 5, 5]}
    assert {name: value.tolist() for name, value in call.negative(index).items()} == {"words": [4, 4, 3], "size": [6, 6, 6]}
    call.state.conditions["negative_words"] = torch.tensor([7, 8])
    assert call.condition(index)["words"].tolist() == [2, 2, 1]
    assert call.negative(index)["words"].tolist() == [8, 8, 7]
    call.condition_on({"words": words}, None)
    assert call.state.conditions["negative_words"] is None


@pytest.mark.parametrize(("offset", "off"), [(0, 1.0), (1, 0.0)])
def test_a_scale_switches_guidance_off_by_the_family_s_form(offset, off):
    tokens = torch.full((2, 16), MASK)
    call = make_call(offset=offset, guidance_scale=off)
    assert not call.guided
    assert call.guidance_weights(tokens).tolist() == [1.0, 1.0]
    call = make_call(offset=offset, guidance_scale=off + 0.5)
    assert call.guided
    assert call.guidance_weights(tokens).tolist() == [off + 0.5 + offset] * 2
    call.state.guidance_scale = off
    assert not call.guided
    assert call.guidance_weights(tokens).tolist() == [1.0, 1.0]


def test_images_share_rows_where_their_conditions_are_equal_as_callbacks_left_them():
    call = make_call(num_prompts=4, tensor_inputs=("words", "negative_words"))
    words, size = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 2]]), torch.tensor([5, 5, 5, 6])
    call.condition_on({"words": words, "size": size}, {"words": torch.zeros(4, 2), "size": torch.zeros(4)})
    tokens, images = torch.full((4, 16), MASK), torch.arange(4)
    assert call.rows(tokens, images).number.tolist() == [0, 1, 0, 2]
    assert call.rows(tokens, images).state.tolist() == [0, 1, 3]
    (negative,) = call.negatives(tokens, images)
    assert (negative.scale, negative.weights.tolist()) == ("guidance_scale", [3.0] * 4)
    assert negative.rows.state.tolist() == [0]
    tokens[2, 5] = 3
    assert call.rows(tokens, images).number.tolist() == [0, 1, 2, 3]
    assert call.negatives(tokens, images)[0].rows.number.tolist() == [0, 0, 1, 0]
    assert call.rows(tokens[:2], torch.tensor([2, 0])).number.tolist() == [0, 0]
    words[0, 0] = 9  # in place, as a callback may
    call.state.conditions["negative_words"] = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 1]])
    call.forget_numbers()
    assert call.rows(tokens[:2], torch.tensor([2, 0])).number.tolist() == [0, 1]
    assert call.negatives(tokens, images)[0].rows.number.tolist() == [0, 0, 1, 2]
