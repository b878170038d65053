"""Calls of `InfoGainPipeline` that are refused, and the words of the refusal."""

from __future__ import annotations

import pytest
import torch
from helpers.amused import CODEBOOK_SIZE, GRID
from helpers.sampling import generators

from diffusers_infogain import InfoGainScheduler

MASK = CODEBOOK_SIZE + 1


def canvas(batch: int = 1) -> torch.Tensor:
    return torch.full((batch, GRID, GRID), MASK)


EMBEDS, STATES = torch.zeros(2, 16), torch.zeros(2, 12, 16)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": None}, "Either `prompt` or `prompt_embeds` must be given"),
        ({"prompt_embeds": EMBEDS, "encoder_hidden_states": STATES}, "and not both"),
        ({"prompt": []}, "`prompt` must be a string or a non-empty list of strings, got []"),
        ({"prompt": 3}, "`prompt` must be a string or a non-empty list of strings, got 3"),
        ({"prompt": ["a cat", None]}, "`prompt` must be a string or a non-empty list of strings"),
        ({"prompt": None, "prompt_embeds": EMBEDS}, "`prompt_embeds` and `encoder_hidden_states` must be given together"),
        ({"negative_prompt_embeds": EMBEDS}, "`negative_prompt_embeds` and `negative_encoder_hidden_states` must be given"),
        (
            {"prompt": None, "prompt_embeds": EMBEDS, "encoder_hidden_states": STATES[:1]},
            "`prompt_embeds` and `encoder_hidden_states` must have the same length, got 2 and 1",
        ),
        ({"negative_prompt": []}, "`negative_prompt` must be a string or a non-empty list of strings, got []"),
        ({"negative_prompt": 3}, "`negative_prompt` must be a string"),
        ({"negative_prompt": ["fog", "mud"]}, "`negative_prompt` must have one entry, or one for each of the 1 prompts, got 2"),
        (
            {"prompt": ["a", "b", "c"], "negative_prompt_embeds": EMBEDS, "negative_encoder_hidden_states": STATES},
            "`negative_prompt_embeds` must have one entry, or one for each of the 3 prompts, got 2",
        ),
        (
            {"negative_prompt": "fog", "negative_prompt_embeds": EMBEDS, "negative_encoder_hidden_states": STATES},
            "`negative_prompt` and `negative_prompt_embeds` must not both be given",
        ),
        ({"generator": generators(1), "num_images_per_prompt": 2}, "`generator` must have one entry for each of the 2 images"),
        ({"prompt": ["a", "b"], "generator": generators(1, 2, 3)}, "(2 prompts x 1 images per prompt), got a list of 3"),
        ({"height": 7}, "`height` and `width` must be positive multiples of 2, got 7 and 8"),
        ({"width": -2}, "`height` and `width` must be positive multiples of 2, got 8 and -2"),
        ({"height": 0}, "`height` and `width` must be positive multiples of 2, got 0 and 8"),
        ({"latents": canvas(2)}, "`latents` must be a long tensor of token ids of shape (1, 4, 4), got torch.int64 (2, 4, 4)"),
        ({"latents": canvas()[0]}, "`latents` must be a long tensor of token ids of shape (1, 4, 4), got torch.int64 (4, 4)"),
        ({"latents": canvas().float()}, "got torch.float32 (1, 4, 4)"),
        ({"latents": canvas(), "height": 16}, "of shape (1, 8, 4)"),
        ({"latents": canvas() - 1}, "`latents` must hold ids from 0 to 23 or the mask id 25, got ids from 24 to 24"),
        ({"latents": canvas() - 26}, "got ids from -1 to -1"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a number in [-1e+06, 1e+06], got nan"),
        (
            {"guidance_schedule": "steep"},
            "`guidance_schedule` must be one of constant, linear, cosine, titok_linear, ",
        ),
        ({"output_type": "jpg"}, "`output_type` must be one of pil, np, pt, latent, got 'jpg'"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer >= 1, got 0"),
        ({"num_images_per_prompt": 1.5}, "`num_images_per_prompt` must be an integer >= 1, got 1.5"),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
            "`callback_on_step_end_tensor_inputs` must be among latents, logits, scores, prompt_embeds, ",
        ),
        (
            {"callback_on_step_end_tensor_inputs": ["\n\n"]},
            "negative_encoder_hidden_states, got ['\\n\\n']",
        ),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1 or None, got 0"),
        ({"lookahead_batch_size": 0}, "`lookahead_batch_size` must be an integer >= 1 or None, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, text):
    with pytest.raises(ValueError) as error:
        pipe(**{"prompt": "a cat", **arguments})
    assert text in str(error.value)


def test_unknown_arguments_are_refused(pipe):
    with pytest.raises(TypeError, match="num_candidates"):
        pipe("a cat", num_candidates=4)


@pytest.mark.parametrize("mask_token_id", [3, CODEBOOK_SIZE - 1, CODEBOOK_SIZE + 2, 999])
def test_a_mask_id_that_the_model_does_not_know_is_refused(pipe, mask_token_id):
    pipe.scheduler = InfoGainScheduler(mask_token_id=mask_token_id)
    with pytest.raises(ValueError, match=f"`mask_token_id` .* codebook's size 24 .* size 26, got {mask_token_id}"):
        pipe("a cat")


def test_a_broken_model_is_named_by_step_and_sample(pipe):
    embeds, states, *_ = pipe.encode_prompt(["a cat", "dogs"])
    embeds[1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN.* at step 0, sample 1, "):
        pipe(prompt_embeds=embeds, encoder_hidden_states=states)
    pipe.transformer.mlm_layer.conv2.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN.* at step 0, sample 0, "):
        pipe(["a cat", "dogs"])


@pytest.mark.parametrize(
    "edit",
    [lambda latents: latents[:, :2], lambda latents: latents.float(), lambda latents: torch.full_like(latents, 24)],
    ids=["shape", "dtype", "ids"],
)
def test_a_callback_that_returns_unusable_tokens_is_told_so(pipe, edit):
    with pytest.raises(ValueError, match="`latents` must"):
        pipe("a cat", num_inference_steps=5, callback_on_step_end=lambda *args: {"latents": edit(args[-1]["latents"])})
