"""What the image pipelines of language models share: prompts of any length, guidance, known tokens, memory, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.checkpoints import make_lumina_pipeline, make_mmada_pipeline, make_showo_pipeline
from helpers.memory import LargestTensors
from helpers.sampling import EAGER, generators
from transformers import LlamaForCausalLM, PhiForCausalLM

from diffusers_infogain import InfoGainScheduler, decode
from diffusers_infogain.image_pipeline_sequence import SequenceImagePipeline

CODES, MASK, OFFSET, MODEL_MASK = 32, 32, 50, 47
PROMPTS = ["a red cat on the mat", "two dogs", "fog"]


@dataclass(frozen=True)
class Family:
    """A tiny pipeline, and its layout: the ids before the prompt, between prompt and image, behind a row and behind the image.

    The network is transformers' own, in which text is causal or not.
    """

    make: Callable[..., SequenceImagePipeline]
    before: tuple[int, ...]
    between: tuple[int, ...]
    row_end: tuple[int, ...]
    behind: tuple[int, ...]
    network: type = LlamaForCausalLM
    causal_text: bool = False


FAMILIES = {
    "mmada": Family(make_mmada_pipeline, (43, 41), (42, 44), (), (45,)),
    "showo": Family(make_showo_pipeline, (43, 41), (42, 44), (), (45,), PhiForCausalLM, causal_text=True),
    # <system>Generate an image according to the text prompt.</system><user>
    "lumina": Family(make_lumina_pipeline, (36, 10, 11, 12, 13, 14, 4, 15, 16, 37, 38), (39, 43, 41), (46,), (42, 44)),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def pipe(family) -> SequenceImagePipeline:
    return family.make()


@torch.no_grad()
def full_logits(pipe: SequenceImagePipeline, family: Family, image: torch.Tensor, prompt: str) -> torch.Tensor:
    """Code logits (h · w, 32) of one image (h, w), from transformers' own network over the whole vocabulary, unpadded."""
    stock = family.network(pipe.transformer.config).eval()
    stock.load_state_dict(pipe.transformer.state_dict())
    ids, places = [*family.before, *pipe.tokenizer(prompt).input_ids, *family.between], []
    for row in image.tolist():
        places += range(len(ids), len(ids) + len(row))
        ids += [*(MODEL_MASK if token == MASK else token + OFFSET for token in row), *family.row_end]
    ids = torch.tensor([[*ids, *family.behind]])
    every = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    if family.causal_text:
        for position in range(places[0] - 1):
            every[..., position, position + 1 :] = -torch.inf
    return stock(ids, attention_mask=every).logits[0, places, OFFSET : OFFSET + CODES]


@torch.no_grad()
def test_padded_prompts_and_single_ones_give_the_same_logits(pipe, family):
    tokens = torch.full((3, 16), MASK)
    tokens[:, ::3] = torch.arange(6) * 5
    images = tokens.view(3, 4, 4)
    ids, mask = pipe.encode_prompt(PROMPTS)
    together = pipe.predict(images, ids, mask).view(3, -1, CODES)
    for row, prompt in enumerate(PROMPTS):
        alone = pipe.predict(images[:1], *pipe.encode_prompt([prompt]))
        expected = full_logits(pipe, family, images[0], prompt)[tokens[0] == MASK]
        torch.testing.assert_close(alone, expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(together[row], expected, atol=2e-5, rtol=1e-5)
    where = torch.zeros(3, 4, 4, dtype=torch.bool)
    where[1, 2, 3] = where[0, 0, 0] = True
    asked = pipe.predict(images, ids, mask, where)
    torch.testing.assert_close(asked[0], full_logits(pipe, family, images[0], PROMPTS[0])[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(asked[1], full_logits(pipe, family, images[1], PROMPTS[1])[11], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["info_gain", "confidence"])
@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
@pytest.mark.parametrize(("chunk", "negative_prompt"), [(None, ["mud", "", "two cat"]), (3, "mud")])
def test_guidance_batches_prompts_and_chunks_give_what_each_image_gives_alone(
    family, sampler, guidance_scale, chunk, negative_prompt
):
    pipe = family.make(sampler=sampler, token_temperature=0.7)
    call = {"guidance_scale": guidance_scale, "num_inference_steps": 4, "output_type": "latent", "return_dict": False}
    tokens, trace = pipe(
        PROMPTS,
        num_images_per_prompt=2,
        generator=generators(*range(6)),
        lookahead_batch_size=chunk,
        negative_prompt=negative_prompt,
        **call,
    )
    assert (tokens < CODES).all()
    negatives = [negative_prompt] * 3 if isinstance(negative_prompt, str) else negative_prompt
    for index in range(6):
        prompt, other = PROMPTS[index // 2], negatives[index // 2] or pipe.unconditional_prompt

        def denoise(states: torch.Tensor, rows: torch.Tensor, prompt: str = prompt, other: str = other) -> torch.Tensor:
            images = states.view(-1, 4, 4)
            cond = torch.stack([full_logits(pipe, family, image, prompt) for image in images])
            if guidance_scale == 0:
                return cond
            uncond = torch.stack([full_logits(pipe, family, image, other) for image in images])
            return (1 + guidance_scale) * cond - guidance_scale * uncond

        canvas = torch.full((1, 16), MASK)
        plain = decode(denoise, pipe.scheduler, canvas, generator=generators(index), grid=(4, 4), num_inference_steps=4)
        assert tokens[index].flatten().tolist() == plain.tokens[0].tolist()
        torch.testing.assert_close(trace.cost[: len(plain.trace.cost), index], plain.trace.cost[:, 0], atol=1e-3, rtol=1e-3)


def test_images_of_every_kind_and_shape(pipe):
    width = 8 if pipe.canvas().only_side else 12
    call = {"num_inference_steps": 2, "height": 8, "width": width}
    output = pipe("fog", output_type="pt", generator=generators(0), **call)
    assert output.images.shape == (1, 3, 8, width)
    assert 0 <= output.images.min() <= output.images.max() <= 1
    assert pipe("fog", generator=generators(0), **call).images[0].size == (width, 8)
    assert pipe("fog", output_type="latent", generator=generators(0), **call).images.shape == (1, 4, width // 2)
    assert pipe("fog", output_type="latent", num_inference_steps=1).images.shape == (1, 4, 4)


def test_known_tokens_stay_and_callbacks_see_logits(pipe):
    latents = torch.full((1, 4, 4), MASK)
    latents[0, 1] = 7
    seen = []
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler="margin", entropy_bound=0)
    tokens = pipe(
        "a cat",
        latents=latents,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs["logits"]) or {},
        callback_on_step_end_tensor_inputs=["logits"],
    ).images
    assert (tokens[0, 1] == 7).all()
    assert len(seen) == 3
    assert seen[0].shape == (1, 16, CODES)
    assert (seen[0][0, 4:8] == 0).all()


def test_offloading_and_half_precision_give_images(pipe, family):
    expected = pipe("a cat", generator=generators(0), num_inference_steps=2, output_type="latent").images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe("a cat", generator=generators(0), num_inference_steps=2, output_type="latent").images, expected)
    half = family.make().to(torch.bfloat16)
    image = half(PROMPTS[:2], generator=generators(0, 1), num_inference_steps=2, output_type="pt").images
    assert image.isfinite().all()
    assert half.vqvae.dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", ["kl", "sum"])
def test_no_tensor_is_larger_than_rows_times_masks_times_codes(pipe, reduction):
    pipe.scheduler = InfoGainScheduler(MASK, **EAGER | {"num_candidates": 8, "gain_reduction": reduction, "entropy_bound": 0})
    # Few masks among many known tokens: nothing has a row for a known one.
    rows = 4 if pipe.canvas().only_side else 8
    latents = torch.arange(rows * rows).view(1, rows, rows) % CODES
    latents[0, -(8 // rows) :] = MASK
    with LargestTensors(pipe.transformer) as largest:
        pipe("a cat", latents=latents, num_inference_steps=4, guidance_scale=3.5, output_type="latent")
    candidates, masks = 8, 8
    assert masks * CODES <= largest.elements[CODES] <= 2 * candidates * masks * CODES
    assert pipe.transformer.config.vocab_size not in largest.elements


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": []}, "`prompt` must be a string or a non-empty list of strings, got []"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` must have one entry, or one for each of the 1 prompts, got 2"),
        ({"height": 7}, "`height` and `width` must be positive multiples of 2, got 7 and 8"),
        ({"latents": torch.full((1, 4, 4), 33)}, "`latents` must hold ids from 0 to 31 or the mask id 32, got ids from 33 to 33"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be a number in [-1e+06, 1e+06], got inf"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, text):
    with pytest.raises(ValueError) as error:
        pipe(**{"prompt": "a cat", **arguments})
    assert text in str(error.value)


def test_a_foreign_mask_id_is_refused(pipe):
    pipe.scheduler = InfoGainScheduler(mask_token_id=5)
    with pytest.raises(ValueError, match="`mask_token_id` of the scheduler must be at least the codebook's size 32"):
        pipe("a cat")
