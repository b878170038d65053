"""Guidance of texts, against whole forwards of each text alone."""

from __future__ import annotations

import pytest
import torch
from helpers.sampling import generators
from helpers.text_pipelines import EOS, MASK, PROMPTS, make_block_pipe, make_pipe

from diffusers_infogain import InfoGainScheduler, decode
from diffusers_infogain.text_branches import AwayTexts, TextBranch

SCALE = 2.5
NEGATIVE = "the fog on the mat"


@torch.no_grad()
def guided_text(pipe, prompt: list[int], away: list[int], new: int, block: int, seed: int, scale: float = SCALE) -> list[int]:
    """One text alone, from whole forwards of it and of the text that it is steered away from, with full attention."""
    tokens = torch.tensor([[*prompt, *[MASK] * new]])
    shift = len(away) - len(prompt)
    (generator,) = generators(seed)
    for start in range(len(prompt), tokens.shape[1], block):
        end = min(start + block, tokens.shape[1])

        def denoise(states: torch.Tensor, sample_index: torch.Tensor, start: int = start, end: int = end) -> torch.Tensor:
            sequences = tokens.expand(len(states), -1).clone()
            sequences[:, start:end] = states
            other = torch.cat([torch.tensor([away]).expand(len(states), -1), sequences[:, len(prompt) :]], dim=1)
            cond = torch.cat([pipe.model(ids[None]) for ids in sequences])[:, start:end]
            uncond = torch.cat([pipe.model(ids[None]) for ids in other])[:, start + shift : end + shift]
            return (uncond + scale * (cond - uncond)).float()

        scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, tokens_per_step=1)
        scheduler.set_timesteps(end - start)
        tokens[:, start:end] = decode(denoise, scheduler, tokens[:, start:end], generator=generator).tokens
    return tokens[0].tolist()


@pytest.mark.parametrize("sampler", ["info_gain", "confidence"])
@pytest.mark.parametrize("negative", [None, NEGATIVE, [NEGATIVE, "a", "dogs"]], ids=str)
def test_guided_texts_are_those_of_whole_forwards(sampler, negative):
    pipe = make_pipe(sampler=sampler, token_temperature=0.8)
    call = {"max_new_tokens": 6, "block_length": 4, "stop_at_eos": False, "guidance_scale": SCALE, "negative_prompt": negative}
    output = pipe(PROMPTS, generator=generators(0, 1, 2), **call)
    for sample, prompt in enumerate(pipe.encode(PROMPTS)):
        away = [MASK] * len(prompt) if negative is None else pipe.encode(negative)[sample if isinstance(negative, list) else 0]
        found = output.sequences[sample][output.attention_mask[sample]].tolist()
        assert found == guided_text(pipe, prompt, away, 6, 4, seed=sample)
    plain = pipe(PROMPTS, generator=generators(0, 1, 2), max_new_tokens=6, block_length=4, stop_at_eos=False)
    assert not torch.equal(plain.sequences, output.sequences)


@pytest.mark.parametrize("cache", ["none", "exact"])
@pytest.mark.parametrize("pack", [False, True])
def test_guidance_of_block_causal_models_is_the_same_with_and_without_a_cache(cache, pack):
    """Also where a block begins with the end of a prompt, masks are filled in, and texts end at different times."""
    if cache == "none" and pack:
        return
    pipe = make_block_pipe()
    prompts = [[0, MASK, 2, 3, 4], [1, 2], [5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10]]
    call = {"max_new_tokens": 11, "guidance_scale": SCALE, "eos_penalty": -2.0}
    expected = [pipe(input_ids=[ids], generator=generators(n), cache="none", **call) for n, ids in enumerate(prompts)]
    output = pipe(input_ids=prompts, generator=generators(0, 1, 2, 3), cache=cache, pack_candidates=pack, **call)
    assert output.texts == [alone.texts[0] for alone in expected]
    assert output.num_evaluations == [alone.num_evaluations[0] for alone in expected]
    assert len({int(ids.eq(EOS).sum()) for ids in output.sequences}) > 1


@torch.no_grad()
def test_the_end_of_a_prompt_is_masked_where_a_block_begins_with_it():
    pipe = make_block_pipe(sampler="confidence", token_temperature=0.0)
    for prompt in ([1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]):
        written, away = torch.tensor([[*prompt, MASK]]), torch.tensor([[MASK] * (len(prompt) + 1)])
        block = torch.arange(len(prompt) + 1) // 4
        mask = torch.zeros(1, 1, len(block), len(block)).double().masked_fill(block[:, None] < block, float("-inf"))
        cond, uncond = (pipe.model(ids, attention_mask=mask).logits[0, -1] for ids in (written, away))
        logits = uncond + SCALE * (cond - uncond)
        logits[MASK] = -torch.inf
        output = pipe(input_ids=[prompt], max_new_tokens=1, guidance_scale=SCALE)
        assert output.sequences[0, len(prompt)] == logits.argmax()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_approximate_caches_change_no_guided_text_in_blocks_of_one_token(cache, negative):
    pipe = make_pipe(sampler="confidence")
    call = {"max_new_tokens": 5, "block_length": 1, "guidance_scale": SCALE, "negative_prompt": negative, "stop_at_eos": False}
    found, expected = (pipe(PROMPTS, generator=generators(0, 1, 2), cache=mode, **call) for mode in (cache, "none"))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.trace.entropies, expected.trace.entropies, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_masks_to_fill_in_are_guided_by_a_masked_prompt():
    pipe = make_pipe(sampler="confidence", token_temperature=0.0)
    prompts = [[0, MASK, 2, 3], [MASK, 1, 2, 3], [0, 1, 2, 3]]
    call = {"max_new_tokens": 2, "guidance_scale": SCALE}
    together = pipe(input_ids=prompts, **call)
    for sample, ids in enumerate(prompts):
        alone = pipe(input_ids=[ids], **call)
        assert torch.equal(alone.sequences[0], together.sequences[sample])
        decoded = [trace.entropies[:, n][trace.selected[:, n]] for trace, n in ((together.trace, sample), (alone.trace, 0))]
        torch.testing.assert_close(*decoded)


def test_rows_are_shared_only_where_the_same_positions_are_wanted():
    """Two states that are equal once their prompts are masked, though one has its prompt where the other wants to know."""
    pipe = make_pipe()
    fixed = torch.tensor([[True, False, True, False], [False, True, True, False]])
    tokens = torch.tensor([[0, MASK, 2, MASK], [MASK, 0, 2, MASK]])
    given, real = torch.full_like(tokens, MASK), torch.ones_like(fixed)
    away = AwayTexts(TextBranch(pipe, "none", False, 2), given, fixed, real, 0)
    away.begin(tokens, torch.arange(2), 0, 4)
    states = torch.cat([tokens[:, :3], torch.tensor([[5], [5]])], dim=1)
    with torch.no_grad():
        logits, rows = away.logits(states, torch.arange(2), states == MASK)
        plain = pipe.model(torch.tensor([[MASK, MASK, MASK, 5]]))[0]
    assert rows.tolist() == [1, 1]
    torch.testing.assert_close(logits.rows, plain[[1, 0]])


@torch.no_grad()
def llada_text(pipe, prompt: list[int], new: int, block: int, steps: int, *, cfg_scale, suppressed, postponed) -> list[int]:
    """LLaDA's published loop at temperature 0: low-confidence remasking, equal steps for all blocks (arXiv 2502.09992)."""
    tokens = torch.tensor([[*prompt, *[MASK] * new]])
    for start in range(len(prompt), tokens.shape[1], block):
        for step in range(steps):
            away = tokens.clone()
            away[:, : len(prompt)] = MASK
            cond, uncond = pipe.model(tokens), pipe.model(away)
            logits = (uncond + (cfg_scale + 1) * (cond - uncond))[0].float()
            logits[:, [MASK, *suppressed]] = -torch.inf
            confidence, chosen = logits.softmax(-1).max(-1)
            confidence[torch.isin(chosen, torch.tensor(postponed))] = -1.0
            masked = tokens[0] == MASK
            masked[start + block :] = False
            count = -(-int(masked.sum()) // (steps - step))
            order = confidence.masked_fill(~masked, -torch.inf).sort(descending=True, stable=True).indices
            tokens[0, order[:count]] = chosen[order[:count]]
    return tokens[0].tolist()


@pytest.mark.parametrize(
    ("published", "call"),
    [
        ({}, {}),
        ({"cfg_scale": 0.5}, {"guidance_scale": 1.5}),
        ({"suppressed": [EOS]}, {"suppress_tokens": ["<|endoftext|>"]}),
        ({"postponed": [EOS]}, {"postpone_eos": True}),
        ({"cfg_scale": 2.0, "postponed": [EOS]}, {"guidance_scale": 3.0, "postpone_eos": True}),
    ],
    ids=str,
)
def test_texts_are_those_of_the_published_loop(published, call):
    settings = {"sampler": "confidence", "token_temperature": 0.0, "masking_schedule": "even"}
    prompts = [[0, 1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11, 12], [13, 14], [15, 16, 17]]
    differ = 0
    for seed in range(2):
        pipe = make_pipe(seed, **settings)
        pipe.model.lm_head.weight.data[EOS] *= 1.5
        off = {"max_new_tokens": 12, "block_length": 6, "num_inference_steps": 8, "stop_at_eos": False}
        output = pipe(input_ids=prompts, **off, **call)
        for sample, prompt in enumerate(prompts):
            defaults = {"cfg_scale": 0.0, "suppressed": [], "postponed": []}
            expected = llada_text(pipe, prompt, 12, 6, 4, **{**defaults, **published})
            assert output.sequences[sample][output.attention_mask[sample]].tolist() == expected
            differ += expected != llada_text(pipe, prompt, 12, 6, 4, **defaults)
    assert differ > 0 or not published


def test_every_state_takes_two_rows_and_equal_states_share_them():
    pipe = make_pipe(sampler="confidence")
    call = {"max_new_tokens": 4, "stop_at_eos": False}
    alone = pipe("a cat", guidance_scale=SCALE, generator=generators(0), **call)
    assert alone.trace.num_evaluations[:, 0].tolist() == [2] * 4
    assert alone.num_evaluations == [8]
    assert pipe("a cat", generator=generators(0), **call).num_evaluations == [4]
    pair = pipe(["a cat", "on fog"], guidance_scale=SCALE, generator=generators(0, 1), **call)
    assert pair.trace.num_evaluations[0].tolist() == [2, 1]  # their prompts, masked, are the same
    assert pair.num_evaluations == [8, 8]
    same = pipe("a cat", guidance_scale=2, num_texts_per_prompt=3, generator=generators(0, 1, 2), **call)
    assert same.trace.num_evaluations[0].tolist() == [2, 0, 0]


def test_callbacks_switch_guidance():
    pipe = make_pipe(sampler="confidence", token_temperature=0.0)

    def switch_on(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 1.0 if step % 2 else SCALE
        return kwargs

    output = pipe("a cat", max_new_tokens=6, callback_on_step_end=switch_on, stop_at_eos=False)
    assert output.trace.num_evaluations[:, 0].tolist() == [1, 2, 1, 2, 1, 2]
    assert output.num_evaluations == [9]
    assert pipe.guidance_scale == 1.0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"guidance_scale": 0.5}, "`guidance_scale` must be a number in .*, got 0.5"),
        ({"guidance_scale": None}, "`guidance_scale` must be a number"),
        ({"negative_prompt": "a"}, "`negative_prompt` must be None without guidance, that is with `guidance_scale` = 1"),
        ({"negative_prompt": 5, "guidance_scale": 2}, "`negative_prompt` must be a string or a non-empty list of strings, got 5"),
        ({"negative_prompt": ["a", "a"], "guidance_scale": 2}, "`negative_prompt` must be one, or one for each of the 3 prompts"),
        ({"negative_prompt": "a <|mdm_mask|>", "guidance_scale": 2}, "`negative_prompt` must be None with masks to fill in"),
        ({"negative_prompt": "a " * 90, "guidance_scale": 2}, "the model takes 64"),
    ],
)
def test_guidance_that_does_not_fit_is_named(call, text):
    pipe = make_pipe()
    pipe.tokenizer.mask_token = pipe.tokenizer.convert_ids_to_tokens(MASK)
    if "<|mdm_mask|>" in str(call):
        call = {**call, "negative_prompt": "a " + pipe.tokenizer.mask_token}
    with pytest.raises(ValueError, match=text):
        pipe(PROMPTS, max_new_tokens=4, **call)


def test_block_causal_models_take_no_negative_prompt():
    text = "`negative_prompt` must be None for sdar with block_causal attention, whose blocks are counted from the first token"
    with pytest.raises(ValueError, match=text):
        make_block_pipe()("a cat", max_new_tokens=4, guidance_scale=2, negative_prompt="a")
