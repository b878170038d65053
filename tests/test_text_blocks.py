"""Text of block-causal and shifted models, and caches of keys and values."""

from __future__ import annotations

import pytest
import torch
from helpers.sampling import generators
from helpers.text_pipelines import EOS, MASK, PROMPTS, make_block_pipe, make_pipe

from diffusers_infogain import InfoGainScheduler, decode
from diffusers_infogain.pipeline_infogain_text import InfoGainTextPipeline


@pytest.fixture
def pipe() -> InfoGainTextPipeline:
    return make_pipe()


@torch.no_grad()
def plain_block_text(pipe, prompt: list[int], new: int, block: int, seed: int) -> list[int]:
    """One text alone, from whole forwards under the full block-causal mask, blocks counted from the first token."""
    tokens = torch.tensor([[*prompt, *[MASK] * new]])
    (generator,) = generators(seed)
    number = torch.arange(tokens.shape[1]) // 4
    mask = torch.zeros(1, 1, *tokens.shape[1:], *tokens.shape[1:], dtype=pipe.model.dtype)
    mask = mask.masked_fill(number[:, None] < number, float("-inf"))
    real = tokens.shape[1]
    tokens = torch.nn.functional.pad(tokens, (0, -real % block), value=EOS)  # blocks are whole, the model sees the text only
    for start in range(0, real, block):
        end = start + block
        if not (tokens[:, start:end] == MASK).any():
            continue

        def denoise(states: torch.Tensor, sample_index: torch.Tensor, start: int = start, end: int = end) -> torch.Tensor:
            sequences = tokens.expand(len(states), -1).clone()
            sequences[:, start:end] = states
            logits = torch.cat([pipe.model(ids[None, :real], attention_mask=mask).logits for ids in sequences])
            return torch.nn.functional.pad(logits, (0, 0, 0, tokens.shape[1] - real))[:, start:end]

        scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, tokens_per_step=1)
        scheduler.set_timesteps(int((tokens[:, start:end] == MASK).sum()))
        tokens[:, start:end] = decode(denoise, scheduler, tokens[:, start:end], generator=generator).tokens
    return tokens[0, :real].tolist()


@pytest.mark.parametrize("cache", [{"cache": "none"}, {}, {"pack_candidates": True}], ids=str)
@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("sampler", ["info_gain", "confidence"])
def test_block_causal_models_give_the_same_with_and_without_a_cache(sampler, block, cache):
    pipe = make_block_pipe(sampler=sampler)
    output = pipe(PROMPTS, max_new_tokens=9, block_length=block, generator=generators(0, 1, 2), stop_at_eos=False, **cache)
    for sample, prompt in enumerate(PROMPTS):
        expected = plain_block_text(pipe, pipe.tokenizer(prompt).input_ids, 9, block or 4, seed=sample)
        assert output.sequences[sample][output.attention_mask[sample]].tolist() == expected


@pytest.mark.parametrize("block", [None, 3])
def test_shifted_models_read_a_prediction_one_token_before(block):
    pipe = make_block_pipe(shifted=True, sampler="info_gain")
    output = pipe(PROMPTS, max_new_tokens=6, block_length=block, generator=generators(0, 1, 2), stop_at_eos=False)
    prompt = pipe.tokenizer(PROMPTS[0]).input_ids
    tokens, (generator,) = torch.tensor([[*prompt, *[MASK] * 6]]), generators(0)
    for start in range(len(prompt), tokens.shape[1], block or 6):
        end = min(start + (block or 6), tokens.shape[1])

        def denoise(states: torch.Tensor, sample_index: torch.Tensor, start: int = start, end: int = end) -> torch.Tensor:
            sequences = tokens.expand(len(states), -1).clone()
            sequences[:, start:end] = states
            seen = torch.zeros(1, 1, sequences.shape[1], sequences.shape[1], dtype=pipe.model.dtype)
            with torch.no_grad():
                return pipe.model(sequences, attention_mask=seen).logits[:, start - 1 : end - 1]

        scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, tokens_per_step=1)
        scheduler.set_timesteps(end - start)
        tokens[:, start:end] = decode(denoise, scheduler, tokens[:, start:end], generator=generator).tokens
    assert output.sequences[0][output.attention_mask[0]].tolist() == tokens[0].tolist()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_approximate_caches_are_options_for_full_attention_only(cache, pipe):
    output = pipe(PROMPTS, max_new_tokens=6, block_length=3, cache=cache, generator=generators(0, 1, 2))
    assert MASK not in output.sequences[output.attention_mask].tolist()
    packed = pipe(PROMPTS, max_new_tokens=6, block_length=3, cache=cache, generator=generators(0, 1, 2), pack_candidates=True)
    assert torch.equal(packed.sequences, output.sequences)
    with pytest.raises(ValueError, match=f"`cache` must be none, exact or None for sdar .*, got '{cache}'"):
        make_block_pipe()("a cat", max_new_tokens=4, cache=cache)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("sampler", ["info_gain", "confidence"])
def test_approximate_caches_change_nothing_in_blocks_of_one_token(sampler, cache):
    """Such a block is decided by its first forward pass, which runs whole texts."""
    pipe = make_pipe(sampler=sampler)
    call = {"max_new_tokens": 5, "block_length": 1, "stop_at_eos": False}
    found, expected = (pipe(PROMPTS, generator=generators(0, 1, 2), cache=mode, **call) for mode in (cache, "none"))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.trace.entropies, expected.trace.entropies, equal_nan=True)


def test_arguments_of_blocks_that_do_not_fit_are_named(pipe):
    text = "`cache` must be none, prefix, dual or None for llada with full attention, got 'exact'"
    with pytest.raises(ValueError, match=text):
        pipe("a cat", max_new_tokens=4, cache="exact")
    with pytest.raises(ValueError, match="`pack_candidates` must be False with the cache 'none', got True"):
        pipe("a cat", max_new_tokens=4, pack_candidates=True)
    with pytest.raises(ValueError, match="`num_inference_steps` must be None with the scheduler's `tokens_per_step` = 2, got 4"):
        make_pipe(tokens_per_step=2)("a cat", max_new_tokens=8, num_inference_steps=4)
    with pytest.raises(ValueError, match="`sampler` and `certainty` must be others than 'halton' for text, which has no grid"):
        make_pipe(sampler="halton")("a cat", max_new_tokens=4)
    with pytest.raises(ValueError, match=text.replace("'exact'", "'block'")):
        pipe("a cat", max_new_tokens=4, cache="block")
    with pytest.raises(ValueError, match="`block_length` must be a multiple of the model's own, 4, got 6"):
        make_block_pipe()("a cat", max_new_tokens=4, block_length=6)
