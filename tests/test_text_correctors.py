"""Correctors in the text pipeline: as the plain loop would do it, for prompts of different lengths, in blocks, with caches."""

import re

import pytest
import torch
from helpers.sampling import generators
from helpers.text_pipelines import MASK, PROMPTS, make_block_pipe, make_pipe

from diffusers_infogain import InfoGainScheduler, decode
from diffusers_infogain.settings import CORRECTORS

STRONG = {"remdm_eta": 0.6, "remdm_alpha_on": 0.5, "verify_threshold": 0.9, "p2_eta": 2.0, "editing_threshold": 0.05}


@torch.no_grad()
def plain_text(pipe, prompt: list[int], steps: int, seed: int) -> list[int]:
    """One text of 8 new tokens in blocks of 4, alone, from logits at all positions."""
    tokens = torch.tensor([[*prompt, *[MASK] * 8]])
    (generator,) = generators(seed)
    for start in (len(prompt), len(prompt) + 4):

        def denoise(states: torch.Tensor, sample_index: torch.Tensor, start: int = start) -> torch.Tensor:
            sequences = tokens.expand(len(states), -1).clone()
            sequences[:, start : start + 4] = states
            return pipe.model(sequences)[:, start : start + 4]

        scheduler = InfoGainScheduler.from_config(pipe.scheduler.config)
        block = tokens[:, start : start + 4]
        output = decode(denoise, scheduler, block, generator=generator, num_inference_steps=steps)
        tokens[:, start : start + 4] = output.tokens
    return tokens[0].tolist()


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("sampler", ["uniform", "info_gain"])
def test_texts_are_corrected_as_each_alone(corrector, sampler):
    pipe = make_pipe(sampler=sampler, corrector=corrector, **STRONG)
    output = pipe(
        PROMPTS, max_new_tokens=8, block_length=4, num_inference_steps=8, generator=generators(0, 1, 2), stop_at_eos=False
    )
    for sample, prompt in enumerate(PROMPTS):
        expected = plain_text(pipe, pipe.tokenizer(prompt).input_ids, 4, seed=sample)
        assert output.sequences[sample][output.attention_mask[sample]].tolist() == expected
    if corrector == "edit":
        before, after = output.trace.tokens[:-1], output.trace.tokens[1:]
        assert ((before != after) & (before != MASK)).any(), "nothing was replaced"
    else:
        assert output.trace.selected.sum() > 24, "nothing was masked again"


@pytest.mark.parametrize("corrector", ["verify", "p2", "edit"])
def test_a_cache_gives_the_same_texts(corrector):
    pipe = make_block_pipe(sampler="uniform", corrector=corrector, **STRONG)
    options = {"max_new_tokens": 8, "num_inference_steps": 8, "stop_at_eos": False}
    texts = [pipe(PROMPTS, cache=cache, generator=generators(0, 1, 2), **options).texts for cache in ("none", "exact")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("corrector", CORRECTORS)
def test_given_tokens_stay_in_an_infilled_text(corrector):
    pipe = make_pipe(sampler="uniform", corrector=corrector, **STRONG)
    ids = torch.tensor([[3, MASK, MASK, 5, MASK, 7, MASK, MASK]])
    steps = {"num_inference_steps": 4} if corrector == "remdm_loop" else {}
    output = pipe(input_ids=ids, max_new_tokens=0, generator=generators(0), stop_at_eos=False, **steps)
    known = ids[0] != MASK
    assert torch.equal(output.sequences[0][known], ids[0][known])
    assert (output.sequences != MASK).all()


def test_the_loop_needs_a_number_of_steps():
    pipe = make_pipe(sampler="uniform", corrector="remdm_loop")
    message = "`num_inference_steps` must be given with the corrector 'remdm_loop', which has a schedule of its own, got None."
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe(PROMPTS, max_new_tokens=8)
