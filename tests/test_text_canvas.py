"""The layout of a batch of texts, on lists."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain.text_canvas import BlockGroup, TextCanvas, lay_out, share_steps

MASK, PAD = 9, 0


def canvas_of(prompts: list[list[int]], max_new_tokens: int, **arguments) -> TextCanvas:
    return lay_out(prompts, mask_token_id=MASK, pad_token_id=PAD, max_new_tokens=max_new_tokens, **arguments)


def test_prompts_of_different_lengths_end_in_one_column():
    canvas = canvas_of([[1, 2, 3], [4]], 4, block_length=3)
    assert canvas.tokens == [[1, 2, 3, 9, 9, 9, 9], [0, 0, 4, 9, 9, 9, 9]]
    assert canvas.attention_mask == [[True] * 7, [False, False, True, True, True, True, True]]
    assert (canvas.new_starts, canvas.new_end, canvas.infilled) == ([3, 3], 7, [False, False])
    assert canvas.blocks == [[BlockGroup((0, 1), 3, 6, 3)], [BlockGroup((0, 1), 6, 7, 1)]]


def test_blocks_of_a_block_causal_model_are_counted_from_the_first_token_and_are_whole():
    canvas = canvas_of([[1, 2, 3, 4, 5], [6]], 2, block_length=4, from_first_token=True)
    assert canvas.tokens == [[1, 2, 3, 4, 5, 9, 9, 0], [6, 9, 9, 0, 0, 0, 0, 0]]
    assert canvas.attention_mask == [[True] * 7 + [False], [True] * 3 + [False] * 5]
    assert (canvas.new_starts, canvas.new_end) == ([5, 1], 8)
    assert canvas.blocks == [[BlockGroup((1,), 0, 4, 2)], [BlockGroup((0,), 4, 8, 2)]]


def test_the_first_block_of_an_infilled_text_begins_with_its_prompt():
    canvas = canvas_of([[1, 9, 2], [3, 4], [9, 5]], 3, block_length=2)
    assert canvas.infilled == [True, False, True]
    assert canvas.tokens[2] == [0, 9, 5, 9, 9, 9]
    first, second = canvas.blocks
    assert first == [BlockGroup((0,), 0, 5, 3), BlockGroup((2,), 1, 5, 3), BlockGroup((1,), 3, 5, 2)]
    assert second == [BlockGroup((0, 1, 2), 5, 6, 1)]


def test_texts_are_decoded_together_only_where_their_numbers_of_steps_are_equal():
    canvas = canvas_of([[9, 9, 1], [9, 2, 9], [9, 9, 9], [1, 2, 3]], 0, tokens_per_step=2)
    assert canvas.blocks == [[BlockGroup((0, 1), 0, 3, 1), BlockGroup((2,), 0, 3, 2)]]


def test_end_tokens_stay_behind_the_new_ones():
    canvas = canvas_of([[1, 2, 8], [3, 8]], 2, num_end_tokens=1)
    assert canvas.tokens == [[1, 2, 9, 9, 8], [0, 3, 9, 9, 8]]
    assert (canvas.new_starts, canvas.new_end) == ([2, 2], 4)


@pytest.mark.parametrize(("mask", "pad", "expected"), [(9, 5, 5), (9, None, 0), (9, 9, 0), (0, 0, 1), (0, None, 1)])
def test_padding_is_never_the_mask(mask, pad, expected):
    canvas = lay_out([[3], [3, 4]], mask_token_id=mask, pad_token_id=pad, max_new_tokens=1)
    assert canvas.tokens[0] == [expected, 3, mask]


def test_steps_are_shared_evenly_over_the_blocks_and_never_exceed_the_masks():
    assert share_steps([4, 4, 2], 8, 1) == [3, 3, 2]
    assert share_steps([4, 1], 8, 1) == [4, 1]
    assert share_steps([4, 3, 1], None, 2) == [2, 2, 1]
    assert share_steps([], 5, 1) == []
    with pytest.raises(ValueError, match="`num_inference_steps` must be at least 1 for each of the 3 blocks, got 2"):
        canvas_of([[1], [1, 2]], 9, block_length=3, num_inference_steps=2)


token = st.integers(1, MASK)


@settings(max_examples=300, deadline=None)
@given(
    prompts=st.lists(st.lists(token, min_size=1, max_size=9), min_size=1, max_size=5),
    new=st.integers(1, 12),
    ends=st.integers(0, 1),
    block=st.one_of(st.none(), st.integers(1, 6)),
    from_first_token=st.booleans(),
    spare_steps=st.one_of(st.none(), st.integers(0, 6)),
    per_step=st.integers(1, 3),
)
def test_every_mask_is_decoded_once_and_every_text_as_if_it_were_alone(
    prompts, new, ends, block, from_first_token, spare_steps, per_step
):
    if from_first_token:
        ends = 0
    if ends:
        prompts = [[*prompt, 8] for prompt in prompts]
    steps = None if spare_steps is None else spare_steps + sum(map(len, prompts)) + new
    arguments = {
        "num_end_tokens": ends,
        "block_length": block,
        "from_first_token": from_first_token,
        "num_inference_steps": steps,
        "tokens_per_step": per_step,
    }
    given_prompts = copy.deepcopy(prompts)
    canvas = canvas_of(prompts, new, **arguments)
    assert prompts == given_prompts
    assert all(len(blocks) > 0 for blocks in canvas.blocks)
    for sample, prompt in enumerate(prompts):
        kept = [id for id, real in zip(canvas.tokens[sample], canvas.attention_mask[sample], strict=True) if real]
        cut = len(prompt) - ends
        assert kept == [*prompt[:cut], *[MASK] * new, *prompt[cut:]]
        assert canvas.tokens[sample][canvas.new_starts[sample]] == MASK
        own = [group for groups in canvas.blocks for group in groups if sample in group.sample_index]
        decoded = [column for group in own for column in range(group.start, group.end)]
        assert decoded == sorted(set(decoded))
        masks = {column for column, id in enumerate(canvas.tokens[sample]) if id == MASK}
        assert masks <= set(decoded)
        assert all(1 <= group.num_steps <= len(masks & set(range(group.start, group.end))) for group in own)
        if steps is not None:
            assert sum(group.num_steps for group in own) <= steps
        alone = [group for (group,) in canvas_of([prompt], new, **arguments).blocks]
        assert [(group.end - group.start, group.num_steps) for group in own] == [
            (group.end - group.start, group.num_steps) for group in alone
        ]


@given(prompts=st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=4), block=st.integers(1, 4))
def test_blocks_follow_each_other_and_hold_only_texts_with_masks(prompts, block):
    canvas = canvas_of(prompts, 5, block_length=block)
    ends = [{group.end for group in groups} for groups in canvas.blocks]
    first = canvas.new_starts[0]
    assert ends == [{min(end, canvas.new_end)} for end in range(first + block, canvas.new_end + block, block)]
    for groups in canvas.blocks:
        samples = [sample for group in groups for sample in group.sample_index]
        assert sorted(samples) == list(range(len(prompts)))
        for group in groups:
            assert all(MASK in canvas.tokens[sample][group.start : group.end] for sample in group.sample_index)
