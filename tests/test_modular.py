"""The blocks for Modular Diffusers give what the pipeline gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.modular import InfoGainBlocks

PROMPTS = ["a red circle", "two blue squares"]


def modular(pipe: Any, **changes: Any) -> ModularPipeline:
    blocks = InfoGainBlocks().init_pipeline()
    blocks.update_components(**{**pipe.components, **changes})
    return blocks


@pytest.mark.parametrize("sampler", ["info_gain", "maskgit"])
def test_the_blocks_give_what_the_pipeline_gives(demo_pipe, sampler):
    scheduler = InfoGainScheduler.from_config(demo_pipe.scheduler.config, sampler=sampler, num_candidates=3)
    call = {"negative_prompt": "a square", "num_inference_steps": 4, "guidance_scale": 1.3, "num_images_per_prompt": 2}
    state = modular(demo_pipe, scheduler=scheduler)(
        prompt=PROMPTS, **call, generator=torch.Generator().manual_seed(3), output_type="np"
    )
    pipe = type(demo_pipe)(**{**demo_pipe.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(PROMPTS, **call, generator=torch.Generator().manual_seed(3), output_type="np")
    assert np.array_equal(state.get("images"), expected.images)
    assert torch.equal(state.get("trace").cost, expected.trace.cost)
    assert state.get("latents").shape == (4, 8, 8)


def test_known_tokens_stay(demo_pipe):
    latents = torch.full((1, 8, 8), demo_pipe.scheduler.config.mask_token_id)
    latents[0, :4] = 5
    found = modular(demo_pipe)(prompt="a red circle", latents=latents, num_inference_steps=2, output="latents")
    assert (found[0, :4] == 5).all()
    assert (found < demo_pipe.scheduler.config.mask_token_id).all()


def test_a_block_can_be_left_out_and_replaced(demo_pipe):
    blocks = InfoGainBlocks()
    encoder = blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    pipe.update_components(**{name: demo_pipe.components[name] for name in ("vqvae", "transformer", "scheduler")})
    alone = encoder.init_pipeline()
    alone.update_components(**{name: demo_pipe.components[name] for name in ("tokenizer", "text_encoder")})
    embeddings = alone(prompt=PROMPTS)
    names = [output.name for output in encoder.intermediate_outputs]
    images = pipe(**{name: embeddings.get(name) for name in names}, num_inference_steps=2, output="images")
    assert [image.size for image in images] == [(64, 64)] * 2
