"""Image to image, inpainting and outpainting in the pipelines of all families."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.dialect import GRID_FAMILIES, OTHER, PROMPT, SIDE, call, family_of, seeded

from diffusers_infogain import PRESETS, InfoGainScheduler
from diffusers_infogain.rules import SAMPLERS
from diffusers_infogain.settings import CORRECTORS


@pytest.fixture(params=GRID_FAMILIES)
def family(request) -> str:
    return request.param


def photograph(pipe, rows: int = SIDE, columns: int = SIDE, seed: int = 0) -> torch.Tensor:
    """Noise of 8 bits, (3, H, W), as large as so many tokens."""
    size = (3, rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor)
    return torch.randint(256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def half_mask(pipe) -> torch.Tensor:
    """The lower half, and one pixel of the token in the first row and the last column."""
    mask = torch.zeros(SIDE * pipe.vae_scale_factor, SIDE * pipe.vae_scale_factor, dtype=torch.bool)
    mask[len(mask) // 2 :] = True
    mask[1, -1] = True
    return mask


def half_cells() -> torch.Tensor:
    cells = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    cells[SIDE // 2 :] = True
    cells[0, -1] = True
    return cells


def use(pipe, **settings):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    return pipe


def test_an_image_has_the_same_tokens_however_it_is_given(pipe):
    images = [photograph(pipe, seed=seed) for seed in range(2)]
    tokens = pipe.encode_image(images, SIDE * pipe.vae_scale_factor, SIDE * pipe.vae_scale_factor)
    assert tokens.shape == (2, SIDE, SIDE)
    assert tokens.dtype == torch.long
    assert tokens.min() >= 0
    assert tokens.max() < pipe.canvas().codebook_size
    low, high = pipe.pixel_range
    for image, expected in zip(images, tokens, strict=True):
        pil = PIL.Image.fromarray(image.movedim(0, -1).numpy())
        assert torch.equal(pipe.encode_image(pil, *image.shape[1:])[0], expected)
        own = pipe.to_tokens(image[None].float() / 255 * (high - low) + low)
        assert torch.equal(own[0], expected)


def test_the_tokenizer_is_the_one_of_the_model(pipe):
    """Its tokens are the codes nearest to the encoder's vectors, which decoding looks up."""
    image = photograph(pipe).float()[None] / 255
    low, high = pipe.pixel_range
    pixels = image * (high - low) + low
    tokens = pipe.to_tokens(pixels)
    vqvae = pipe.vqvae
    if family_of(pipe) in ("mmada", "showo"):
        assert torch.equal(tokens, vqvae.quantize.codes(vqvae.encoder(pixels)))
    else:
        vectors = vqvae.quant_conv(vqvae.encoder(pixels)).movedim(1, -1)
        codes = vqvae.quantize.embedding.weight
        assert torch.equal(tokens, torch.cdist(vectors.flatten(0, 2), codes).argmin(-1).view(tokens.shape))
    decoded = pipe.to_pixels(tokens)
    assert decoded.shape == image.shape


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_unmasked_pixels_and_tokens_stay_exactly(pipe, output_type):
    image, mask = photograph(pipe), half_mask(pipe)
    arguments = {"image": image, "mask_image": mask, "generator": seeded(3)}
    known = pipe.encode_image(image, *image.shape[1:])[0]
    tokens = call(pipe, **arguments).images[0]
    assert torch.equal(tokens[~half_cells()], known[~half_cells()])
    output = call(pipe, **{**arguments, "generator": seeded(3), "output_type": output_type})
    assert torch.equal(output.trace.decoded_at[0].view(SIDE, SIDE) >= 0, half_cells())
    pixels = torch.from_numpy(np.array(output.images[0])) if output_type != "pt" else output.images[0].movedim(0, -1)
    pixels = pixels if output_type == "pil" else (pixels * 255).round().byte()
    assert torch.equal(pixels[~mask], image.movedim(0, -1)[~mask])
    decoded = pipe.image_processor.postprocess(pipe.to_pixels(tokens[None]), "pt")[0].movedim(0, -1)
    assert torch.equal(pixels[mask], (decoded * 255).round().byte()[mask])


def test_half_precision_changes_no_pixel_that_stays(pipe):
    image, mask = photograph(pipe), half_mask(pipe)
    pipe.to(torch.bfloat16)
    if "force_upcast" in pipe.vqvae.config:
        pipe.vqvae.register_to_config(force_upcast=False)
    pixels = call(pipe, image=image, mask_image=mask, output_type="pt").images[0]
    assert torch.equal(pixels[:, ~mask], (image.float() / 255)[:, ~mask])


WAYS = {
    **{sampler: {"sampler": sampler} for sampler in SAMPLERS if sampler != "pc_sampler"},
    **{f"preset {name}": preset for name, preset in PRESETS.items()},
    **{
        corrector: {"sampler": "uniform", "entropy_bound": 0, "corrector": corrector, "remdm_eta": 0.5, "verify_threshold": 0.9}
        for corrector in CORRECTORS
    },
    "retries": {"retry_below_nats": -3.0, "num_tries": 3},
    "runs": {"num_runs": 3},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_sampler_changes_a_known_token(pipe, way):
    settings = dict(WAYS[way])
    search = {name: settings.pop(name) for name in ("num_runs", "num_beams") if name in settings}
    use(pipe, **settings)
    images = [photograph(pipe, seed=seed) for seed in (5, 6)]
    prompts = [PROMPT[family_of(pipe)], OTHER[family_of(pipe)]]
    arguments = {"mask_image": half_mask(pipe), "guidance_scale": 3.0, **search}
    together = call(pipe, prompts, image=images, generator=seeded(1, 2), **arguments).images
    known = pipe.encode_image(images, *images[0].shape[1:])
    assert torch.equal(together[:, ~half_cells()], known[:, ~half_cells()])
    assert (together != pipe.scheduler.config.mask_token_id).all()
    alone = call(pipe, prompts[1], image=images[1], generator=seeded(2), **arguments).images
    assert torch.equal(alone[0], together[1])


def test_image_to_image_keeps_a_share_that_the_seed_decides(pipe):
    image = photograph(pipe)
    known = pipe.encode_image(image, *image.shape[1:])[0]
    output = call(pipe, image=image, strength=0.25, num_inference_steps=8, generator=seeded(4))
    changed = output.trace.decoded_at[0].view(SIDE, SIDE) >= 0
    assert changed.sum() == 4
    assert len(output.trace.winner) <= 2, "a quarter of the steps"
    assert torch.equal(output.images[0][~changed], known[~changed])
    again = call(pipe, image=image, strength=0.25, num_inference_steps=8, generator=seeded(output.seeds[0]))
    assert torch.equal(again.images, output.images)
    others = call(pipe, image=image, strength=0.25, num_inference_steps=8, generator=seeded(4, 5), num_images_per_prompt=2)
    assert torch.equal(others.images[0], output.images[0])
    assert not torch.equal(*(others.trace.decoded_at >= 0))


def test_outpainting_keeps_the_image_in_its_place(pipe):
    unit = pipe.vae_scale_factor
    sides = {"left": unit, "top": 2 * unit}
    if pipe.canvas().only_side:
        image, size = photograph(pipe, SIDE - 2, SIDE - 1), {}
    else:
        image, size = photograph(pipe), {"height": (SIDE + 2) * unit, "width": (SIDE + 1) * unit}
    output = call(pipe, image=image, outpaint=sides, output_type="pil", **size)
    pixels = torch.from_numpy(np.array(output.images[0]))
    assert torch.equal(pixels[2 * unit :, unit:], image.movedim(0, -1))
    rows, columns = output.images[0].height // unit, output.images[0].width // unit
    decoded = output.trace.decoded_at[0].view(rows, columns) >= 0
    assert decoded.sum() == rows * columns - (rows - 2) * (columns - 1)
    assert not decoded[2:, 1:].any()


def test_by_default_padding_is_added_where_the_model_takes_any_size(pipe):
    unit, side = pipe.vae_scale_factor, pipe.canvas().side
    image = PIL.Image.new("RGB", (70, 50), "teal")
    arguments = {"image": image, "outpaint": {"right": 2 * unit}, "height": None, "width": None, "output_type": "pil"}
    output = call(pipe, **arguments)
    grown = 0 if pipe.canvas().only_side else 2 * unit
    assert output.images[0].size == (side * unit + grown, side * unit)


def test_a_soft_seam_blends_outside_the_mask_only(pipe):
    image, mask = photograph(pipe), half_mask(pipe)
    arguments = {"image": image, "mask_image": mask, "output_type": "pt"}
    hard, soft = (call(pipe, mask_blur=blur, **arguments).images[0] for blur in (0, 2))
    assert torch.equal(hard[:, mask], soft[:, mask])
    assert not torch.equal(hard, soft)


def test_mask_coverage_spares_tokens_that_are_hardly_masked(pipe):
    output = call(pipe, image=photograph(pipe), mask_image=half_mask(pipe), mask_coverage=0.9)
    decoded = output.trace.decoded_at[0].view(SIDE, SIDE) >= 0
    assert decoded[SIDE // 2 :].all()
    assert not decoded[: SIDE // 2].any()


def test_callbacks_and_interruption_work_as_in_generation(pipe):
    seen = []

    def stop(pipe, step, timestep, arguments):
        seen.append(arguments["latents"].clone())
        pipe._interrupt = True
        return arguments

    image, mask = photograph(pipe), half_mask(pipe)
    use(pipe, sampler="uniform", entropy_bound=0)
    arguments = {"image": image, "mask_image": mask, "num_inference_steps": 4}
    output = call(pipe, output_type="pil", callback_on_step_end=stop, **arguments)
    assert len(seen) == 1
    assert (seen[0] == pipe.scheduler.config.mask_token_id).any()
    pixels = torch.from_numpy(np.array(output.images[0]))
    assert torch.equal(pixels[~mask], image.movedim(0, -1)[~mask])


def test_a_picture_records_its_edit_but_not_the_image(pipe):
    arguments = {"image": photograph(pipe), "mask_image": half_mask(pipe), "strength": 0.5, "output_type": "pil"}
    records = [json.loads(call(pipe, **arguments, mask_blur=blur).images[0].info["infogain"]) for blur in (0, 1)]
    assert [record["strength"] for record in records] == [0.5, 0.5]
    assert [record["mask_blur"] for record in records] == [0, 1]
    assert records[0]["num_inference_steps"] == 3
    assert len(records[0]["image_sha256"]) == 64
    assert records[0]["image_sha256"] != records[1]["image_sha256"]
    plain = json.loads(call(pipe, output_type="pil").images[0].info["infogain"])
    assert "strength" not in plain
    assert "image_sha256" not in plain


def test_latents_and_missing_tokenizers_are_refused(pipe):
    mask = pipe.scheduler.config.mask_token_id
    with pytest.raises(ValueError, match="`latents` must be None with `image`"):
        call(pipe, image=photograph(pipe), latents=torch.full((1, SIDE, SIDE), mask))
    pipe.vqvae = None
    with pytest.raises(ValueError, match="`vqvae` must not be None"):
        call(pipe, image=photograph(pipe))
    with pytest.raises(ValueError, match="`vqvae` must not be None"):
        pipe.encode_image(photograph(pipe))
