"""LLaDA 2 decoded as diffusers' own pipeline for it does: thresholds, token editing, model calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from helpers.checkpoints_text import write_llada2
from transformers import Glm4MoeForCausalLM

from diffusers_infogain import InfoGainScheduler, InfoGainTextPipeline

MASK, BLOCK = 259, 4


class LLaDA2(torch.nn.Module):
    """The model as diffusers' pipeline calls it, with a mask of padding, of which there is none. It never predicts a mask."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, model: Glm4MoeForCausalLM):
        super().__init__()
        self.model, self.config = model, model.config
        self.num_calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> Any:
        self.num_calls += 1
        block = torch.arange(input_ids.shape[1]) // BLOCK
        hidden = torch.zeros(block.shape * 2).masked_fill(block[:, None] < block, torch.finfo(torch.float32).min)
        output = self.model(input_ids, attention_mask=hidden[None, None], position_ids=position_ids, use_cache=False)
        output.logits[..., MASK] = -torch.inf
        return output


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> InfoGainTextPipeline:
    folder = write_llada2(tmp_path_factory.mktemp("llada2") / "model", block_size=BLOCK)
    pipe = InfoGainTextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6])
@pytest.mark.parametrize(("editing_threshold", "post"), [(None, 16), (0.2, 16), (0.05, 5), (0.3, 2), (0.05, 0)])
@pytest.mark.parametrize("cache", ["none", "exact"])
def test_texts_are_those_of_diffusers(pipe, threshold, editing_threshold, post, cache):
    model = LLaDA2(pipe.model)
    theirs = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(block_length=BLOCK), tokenizer=pipe.tokenizer)
    theirs.set_progress_bar_config(disable=True)
    pipe.scheduler = InfoGainScheduler(
        mask_token_id=MASK,
        sampler="confidence_parallel",
        parallel_threshold=threshold,
        tokens_per_step=1,
        token_temperature=0,
        corrector=None if editing_threshold is None else "edit",
        editing_threshold=editing_threshold or 0.5,
        max_post_steps=post,
    )
    for seed in range(3):
        length = 5 + seed
        ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))
        new = 3 * BLOCK - length % BLOCK
        model.num_calls = 0
        # Of as many steps as tokens the last one would end a block without a look at it.
        expected = theirs(
            input_ids=ids,
            gen_length=new,
            block_length=BLOCK,
            num_inference_steps=BLOCK + 1,
            sampling_method="greedy",
            threshold=threshold,
            editing_threshold=editing_threshold,
            max_post_steps=post,
            eos_early_stop=False,
            mask_token_id=MASK,
            output_type="seq",
        ).sequences
        found = pipe(input_ids=ids, max_new_tokens=new, stop_at_eos=False, cache=cache)
        assert found.sequences[0, length:].tolist() == expected[0].tolist()
        if editing_threshold is not None:  # without it diffusers runs a finished block once more for nothing
            assert found.trace.num_evaluations.sum() == model.num_calls
