"""Correctors in the image pipelines of all families."""

import pytest
import torch
from helpers.dialect import OTHER, PROMPT, call, family_of, grid_of, seeded

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.settings import CORRECTORS


def with_scheduler(pipe, **settings):
    config = {"sampler": "uniform", "entropy_bound": 0, "masking_schedule": "linear", **settings}
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **config)
    return pipe


@pytest.mark.parametrize("corrector", CORRECTORS)
def test_an_image_is_the_same_alone_and_in_a_batch_and_known_tokens_stay(pipe, corrector):
    with_scheduler(pipe, corrector=corrector, remdm_eta=0.5, verify_threshold=0.9, editing_threshold=0.05)
    mask = pipe.scheduler.config.mask_token_id
    latents = torch.full((2, *grid_of(pipe)), mask)
    latents.flatten(1)[:, :4] = 3
    prompts, options = [PROMPT[family_of(pipe)], OTHER[family_of(pipe)]], {"num_inference_steps": 6, "guidance_scale": 3.0}
    together = call(pipe, prompts, latents=latents, generator=seeded(1, 2), lookahead_batch_size=1, **options)
    assert (together.images.flatten(1)[:, :4] == 3).all()
    assert (together.images != mask).all()
    if corrector == "edit":
        with_scheduler(pipe, corrector=None)
        plain = call(pipe, prompts, latents=latents, generator=seeded(1, 2), lookahead_batch_size=1, **options)
        assert (plain.images != together.images).any(), "nothing was edited"
        with_scheduler(pipe, corrector=corrector, editing_threshold=0.05)
    else:
        assert together.trace.selected.sum() > 24, "nothing was masked again"
    for index, prompt in enumerate(prompts):
        alone = call(pipe, prompt, latents=latents[index : index + 1], generator=seeded(1 + index), **options)
        assert torch.equal(alone.images[0], together.images[index])


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_logits_everywhere_are_read_as_logits_at_masks_are(pipe, guidance):
    plain = call(with_scheduler(pipe), guidance_scale=guidance)
    everywhere = call(with_scheduler(pipe, corrector="p2", p2_eta=0), guidance_scale=guidance)
    assert torch.equal(plain.images, everywhere.images)


def test_beams_are_refused(pipe):
    with_scheduler(pipe, sampler="info_gain", corrector="verify")
    with pytest.raises(ValueError, match=r"`num_beams` must be 1 with the corrector 'verify', got 2."):
        call(pipe, num_beams=2)
