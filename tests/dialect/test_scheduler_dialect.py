"""`InfoGainScheduler` where diffusers' own schedulers stand: loops, configurations, copies."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import PIL.Image
import pytest
import torch
from diffusers import AmusedImg2ImgPipeline, AmusedInpaintPipeline, AmusedPipeline, AmusedScheduler
from helpers.amused import make_components
from helpers.sampling import HashModel, make_scheduler

from diffusers_infogain import PRESETS, InfoGainScheduler, decode
from diffusers_infogain.components import as_infogain_scheduler
from diffusers_infogain.rules import SAMPLERS

MASK = 25


def both_schedulers(steps: int, **config) -> tuple[InfoGainScheduler, AmusedScheduler]:
    ours = InfoGainScheduler(mask_token_id=MASK, sampler="maskgit", entropy_bound=0, **config)
    stock = AmusedScheduler(mask_token_id=MASK, **config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps, (2, 0))
    return ours, stock


def tokens_and_logits(batch: int = 2, height: int = 4, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(MASK - 1, (batch, height, width), generator=generator)
    return tokens, torch.randn(batch, MASK - 1, height, width, generator=generator)


@pytest.mark.parametrize("masking_schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_add_noise_masks_what_amused_masks(masking_schedule, steps):
    ours, stock = both_schedulers(steps, masking_schedule=masking_schedule)
    tokens, _ = tokens_and_logits()
    before = tokens.clone()
    for timestep in ours.timesteps:
        noisy = ours.add_noise(tokens, timestep, generator=torch.Generator().manual_seed(3))
        assert torch.equal(noisy, stock.add_noise(tokens, timestep, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(tokens, before)


def test_add_noise_of_a_sample_is_the_same_alone():
    ours, _ = both_schedulers(6)
    tokens, _ = tokens_and_logits(batch=3)
    seeds = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    noisy = ours.add_noise(tokens.flatten(1), 3, seeds)
    alone = ours.add_noise(tokens[1:2].flatten(1), 3, [torch.Generator().manual_seed(5)])
    assert torch.equal(noisy[1:2], alone)
    with pytest.raises(ValueError, match="list of 1 generators for a batch of 3 samples"):
        ours.add_noise(tokens, 3, [torch.Generator()])


@pytest.mark.parametrize(("tokens_per_step", "share"), [(6, 0.5), (100, 0.0), (1, 22 / 24)])
def test_add_noise_leaves_what_a_fixed_pace_leaves(tokens_per_step, share):
    scheduler = InfoGainScheduler(mask_token_id=MASK, tokens_per_step=tokens_per_step)
    scheduler.set_timesteps(9)
    tokens = torch.zeros(400, 24, dtype=torch.long)
    noisy = scheduler.add_noise(tokens, 7, torch.Generator().manual_seed(0))
    assert (noisy == MASK).float().mean().item() == pytest.approx(share, abs=0.02)
    assert (scheduler.add_noise(tokens, 0) == 0).all()


def test_add_noise_knows_its_timesteps():
    ours, _ = both_schedulers(6)
    tokens, _ = tokens_and_logits()
    with pytest.raises(ValueError, match="`timestep` must be one of the scheduler's 6 timesteps, got 6"):
        ours.add_noise(tokens, 6)


@pytest.mark.parametrize("masking_schedule", ["cosine", "linear"])
@pytest.mark.parametrize("masks", [1, 5, 12, 24])
@pytest.mark.parametrize("first", [0, 2])
def test_step_begins_the_schedule_at_the_starting_mask_ratio(masking_schedule, masks, first):
    ours, stock = both_schedulers(7, masking_schedule=masking_schedule)
    tokens, logits = tokens_and_logits()
    flat = tokens.flatten(1)
    flat[:, :masks] = MASK
    ratio = (flat == MASK).sum() / flat.numel()
    mine = theirs = flat.view(tokens.shape)
    for timestep in ours.timesteps[first:]:
        mine = ours.step(logits, timestep, mine, starting_mask_ratio=ratio).prev_sample
        theirs = stock.step(logits, timestep, theirs, starting_mask_ratio=ratio).prev_sample
        left = (mine == MASK).flatten(1).sum(1)
        # `AmusedScheduler` keeps a mask in every step but the last, and masks a known token for it where none is left.
        assert torch.equal(left, (theirs == MASK).flatten(1).sum(1) - ((left == 0) & (timestep > 0)).long())
    assert (mine != MASK).all()


@pytest.mark.parametrize("ratio", [-0.1, 1.5, "half", torch.tensor(2.0)])
def test_step_refuses_a_share_that_is_none(ratio):
    ours, _ = both_schedulers(7)
    tokens, logits = tokens_and_logits()
    with pytest.raises(ValueError, match=r"`starting_mask_ratio` must be a number in \[0, 1\] or None, got"):
        ours.step(logits, 6, tokens, starting_mask_ratio=ratio)


@pytest.mark.parametrize("sampler", ["maskgit", "confidence", "halton", "entropy_bound", "klass_parallel"])
def test_stock_pipelines_run_with_it(sampler):
    image = PIL.Image.new("RGB", (8, 8), "red")
    mask = PIL.Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    for kind, call in (
        (AmusedPipeline, {"height": 8, "width": 8}),
        (AmusedImg2ImgPipeline, {"image": image, "strength": 0.7}),
        (AmusedImg2ImgPipeline, {"image": image, "strength": 1.0}),
        (AmusedInpaintPipeline, {"image": image, "mask_image": mask}),
    ):
        pipe = kind(**make_components())
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler=sampler)
        seed = torch.Generator().manual_seed(0)
        tokens = pipe("a cat", num_inference_steps=4, generator=seed, output_type="latent", **call).images
        assert tokens.shape == (1, 4, 4)
        assert (tokens < 24).all()


def test_the_stock_inpainting_pipeline_keeps_what_is_not_masked():
    image = PIL.Image.effect_noise((8, 8), 90).convert("RGB")
    mask = PIL.Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    pipe = AmusedInpaintPipeline(**make_components())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler="confidence")
    seed = torch.Generator().manual_seed(0)
    tokens = pipe("a cat", image, mask, strength=1.0, generator=seed, output_type="latent").images
    latents = pipe.vqvae.encode(pipe.image_processor.preprocess(image)).latents
    known = pipe.vqvae.quantize(latents)[2][2].view(1, 4, 4)
    assert torch.equal(tokens[:, :, 2:], known[:, :, 2:])


def test_compatible_schedulers_are_found():
    assert AmusedScheduler in InfoGainScheduler(mask_token_id=MASK).compatibles


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_every_way_through(preset, tmp_path, caplog):
    scheduler = InfoGainScheduler(mask_token_id=MASK, **PRESETS[preset])
    scheduler.save_pretrained(tmp_path / "own")
    stock = AmusedScheduler.from_config(scheduler.config)
    stock.save_pretrained(tmp_path / "stock")
    again = {
        "own": InfoGainScheduler.from_pretrained(tmp_path / "own"),
        "through aMUSEd": InfoGainScheduler.from_pretrained(tmp_path / "stock"),
        "converted": as_infogain_scheduler(stock),
        "copied": copy.deepcopy(scheduler),
        "pickled": pickle.loads(pickle.dumps(scheduler)),
    }
    expected = json.loads(scheduler.to_json_string())
    for way, other in again.items():
        config = json.loads(other.to_json_string())
        assert {name: config[name] for name in expected if name[0] != "_"} == {
            name: value for name, value in expected.items() if name[0] != "_"
        }, way


def test_a_copy_goes_its_own_way():
    scheduler = InfoGainScheduler(mask_token_id=MASK, sampler="confidence")
    scheduler.set_timesteps(5)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(other.timesteps, scheduler.timesteps)
        other.set_timesteps(3)
        other.register_to_config(num_candidates=7)
    assert len(scheduler.timesteps) == 5
    assert scheduler.config.num_candidates == 4


def test_an_amused_scheduler_made_from_positions_is_converted():
    """diffusers counts values given by position as defaults, and leaves those out of what it reads from a configuration."""
    stock = AmusedScheduler(MASK, "linear")
    scheduler = as_infogain_scheduler(stock)
    assert (scheduler.config.mask_token_id, scheduler.config.masking_schedule) == (MASK, "linear")


def test_settings_with_a_typo_are_refused(tmp_path):
    scheduler = InfoGainScheduler(mask_token_id=MASK)
    with pytest.raises(TypeError, match="InfoGainScheduler has no setting 'num_candidate'; the closest is 'num_candidates'"):
        InfoGainScheduler.from_config(scheduler.config, num_candidate=8)
    with pytest.raises(TypeError, match="no setting 'zzz'; there are mask_token_id, "):
        InfoGainScheduler.from_config(AmusedScheduler(mask_token_id=MASK).config, zzz=8)
    scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(TypeError, match="no setting 'entropybound'; the closest is 'entropy_bound'"):
        InfoGainScheduler.from_pretrained(tmp_path, subfolder="scheduler", entropybound=1)
    _, unused = InfoGainScheduler.from_config(scheduler.config, return_unused_kwargs=True, num_candidate=8)
    assert unused["num_candidate"] == 8


def test_keys_of_another_scheduler_stay_fine():
    config = {**AmusedScheduler(mask_token_id=MASK).config, "temperature": (2, 0)}
    assert InfoGainScheduler.from_config(config, num_candidates=8).config.num_candidates == 8


def test_steps_as_a_tuple_and_as_an_output():
    ours, _ = both_schedulers(7)
    tokens, logits = tokens_and_logits()
    tokens[:, 1:] = MASK
    for timestep in (3, 5):
        (sample,) = ours.step(logits, timestep, tokens, torch.Generator().manual_seed(0), return_dict=False)
        output = ours.step(logits, timestep, tokens, torch.Generator().manual_seed(0))
        assert torch.equal(sample, output.prev_sample)
        assert sample.shape == tokens.shape


def test_compatible_schedulers_give_the_configuration_back():
    scheduler = InfoGainScheduler(mask_token_id=MASK, num_candidates=9)
    for kind in scheduler.compatibles:
        again = InfoGainScheduler.from_config(kind.from_config(scheduler.config).config)
        settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        assert {name: again.config[name] for name in settings} == settings


def test_attributes_of_a_scheduler():
    scheduler = InfoGainScheduler(mask_token_id=MASK)
    scheduler.of_the_user = 5
    assert scheduler.of_the_user == 5
    assert scheduler.save_pretrained == scheduler.save_pretrained
    with pytest.raises(AttributeError, match="does_not_exist"):
        _ = scheduler.does_not_exist
    assert "kwargs" not in inspect.signature(InfoGainScheduler.__init__).parameters


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_default_dtype_changes_no_draw(sampler, default):
    model = HashModel(length=24, num_tokens=16, conditions=(1, 2))

    def run():
        scheduler = make_scheduler(16, 5, sampler=sampler, **({} if sampler == "entropy_bound" else {"entropy_bound": 0.3}))
        scheduler.set_timesteps(5)
        tokens = torch.full((2, 24), 16)
        tokens[:, :3] = 5
        return decode(model, scheduler, tokens, generator=torch.Generator().manual_seed(0), grid=(4, 6))

    expected = run()
    torch.set_default_dtype(default)
    try:
        output = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output.tokens, expected.tokens)
    for name, value in expected.trace.tensors().items():
        torch.testing.assert_close(getattr(output.trace, name), value, rtol=0, atol=0, equal_nan=True)
