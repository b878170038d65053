"""The embedded model is what its card says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AmusedPipeline

import diffusers_infogain
from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.checkpoints.stock import decode_vqvae
from diffusers_infogain.demo import checker, shapes
from diffusers_infogain.evaluation.runs import generate_images

FOLDER = Path(diffusers_infogain.DEMO_MODEL)

GUIDANCE_SCALE = 1.2


def held_out(num: int, seed: int = 7) -> list[shapes.Caption]:
    return shapes.sample_captions(num, torch.Generator().manual_seed(seed), held_out=True)


def share_right(images, captions) -> float:
    return sum(checker.check_image(image, caption).holds for image, caption in zip(images, captions, strict=True)) / len(captions)


def test_is_a_small_repository_of_safetensors_with_a_card():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert "held-out" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_words_of_the_world_are_single_tokens(demo_pipe):
    for caption in shapes.all_captions():
        assert len(demo_pipe.tokenizer(caption.text).input_ids) == len(caption.text.split()) + 2


def test_its_own_reconstructions_of_held_out_images_are_read_right(demo_pipe):
    captions = held_out(200)
    images = shapes.render(shapes.sample_scenes(captions, torch.Generator().manual_seed(8)))
    with torch.no_grad():
        latents = demo_pipe.vqvae.encode(images).latents
        codes = demo_pipe.vqvae.quantize(latents)[2][2].view(len(images), 8, 8)
        reconstructions = demo_pipe.image_processor.postprocess(decode_vqvae(demo_pipe.vqvae, codes).clamp(0, 1), "pil")
    assert share_right(reconstructions, captions) >= 0.97


def share_of_greedy_images(pipe, captions) -> float:
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler="confidence")
    prompts, seeds = [caption.text for caption in captions], list(range(len(captions)))
    call = {"num_inference_steps": 16, "guidance_scale": pipe.default_guidance_scale}
    return share_right(generate_images(pipe, prompts, seeds, 20, "confidence", **call).images, captions)


def test_greedy_sampling_is_good_with_room_above(demo_pipe):
    # Two in three on many images: 60 of them stay within four standard errors, and leave room above.
    assert abs(share_of_greedy_images(demo_pipe, held_out(60)) - 0.64) <= 4 * 0.062


@pytest.mark.slow
def test_greedy_sampling_is_good_with_room_above_on_many_images(demo_pipe):
    assert 0.60 <= share_of_greedy_images(demo_pipe, held_out(500, seed=9)) <= 0.95


@pytest.mark.slow
def test_maskgit_rule_is_the_sampler_of_the_stock_pipeline(demo_pipe):
    """Same weights, steps and temperature: the same share of images is right, with as many objects."""
    captions = held_out(120, seed=10)
    prompts = [caption.text for caption in captions]
    stock = AmusedPipeline.from_pretrained(diffusers_infogain.DEMO_MODEL)
    stock.set_progress_bar_config(disable=True)
    theirs = []
    for first in range(0, len(prompts), 20):
        generator = torch.Generator().manual_seed(first)
        batch = prompts[first : first + 20]
        theirs += stock(batch, generator=generator, num_inference_steps=8, guidance_scale=GUIDANCE_SCALE).images
    demo_pipe.scheduler = InfoGainScheduler.from_config(demo_pipe.scheduler.config, sampler="maskgit")
    ours = generate_images(
        demo_pipe,
        prompts,
        list(range(120)),
        20,
        "maskgit",
        num_inference_steps=8,
        guidance_scale=demo_pipe.default_guidance_scale,
    ).images
    a, b = share_right(theirs, captions), share_right(ours, captions)
    error = ((a * (1 - a) + b * (1 - b)) / len(captions)) ** 0.5
    assert abs(a - b) <= 4 * error + 1 / len(captions)
    counts = [torch.tensor([float(len(checker.find_objects(image))) for image in images]) for images in (theirs, ours)]
    error = sum(count.var() / len(count) for count in counts).sqrt()
    assert abs(counts[0].mean() - counts[1].mean()) <= 4 * error


@pytest.mark.parametrize("prompt", ["a red circle", "a yellow diamond"])
def test_the_first_line_that_a_newcomer_types_draws_what_it_says(prompt):
    pipe = diffusers_infogain.load("demo")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(prompt, generator=torch.Generator().manual_seed(0)).images[0]
    assert checker.check_image(image, shapes.parse_caption(prompt)).holds
    assert pipe.default_guidance_scale == GUIDANCE_SCALE
