"""Logits of masked language models at some positions, padded, shifted, by blocks; caches against none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints_text import write_bert, write_dream, write_llada, write_mdlm_qwen3, write_sdar
from helpers.text import load_text_model, masked_lm_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from diffusers_infogain.models.text_family import TextFamily
from diffusers_infogain.models.text_logits import TextCache, _visible

WRITERS = {"llada": write_llada, "dream": write_dream, "sdar": write_sdar, "a2d": write_mdlm_qwen3, "masked_lm": write_bert}
NATIVE = ("llada", "dream", "sdar", "a2d")
FULL = ("llada", "dream", "a2d")
# A block-causal model with shifted logits, which no family here is yet, differs from SDAR in that flag alone.
BLOCKS = ("sdar", "shifted sdar")

Loaded = tuple[PreTrainedModel, TextFamily]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, Loaded]:
    folder: Path = tmp_path_factory.mktemp("models")
    models = {}
    for name, write in WRITERS.items():
        model, _, family = load_text_model(write(folder / name))
        models[name] = model, family
    model, family = models["sdar"]
    models["shifted sdar"] = model, TextFamily(**{**vars(family), "shifted": True})
    return models


def draw_rows(model: Any, lengths: list[int], left: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids (R, longest) and which of them are no padding."""
    longest = max(lengths)
    ids = torch.randint(0, model.config.vocab_size, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    columns = torch.arange(longest)
    length = torch.tensor(lengths)[:, None]
    return ids, (columns >= longest - length) if left else (columns < length)


@pytest.mark.parametrize("name", [*WRITERS, "shifted sdar"])
@pytest.mark.parametrize("left", [True, False])
def test_a_row_is_the_same_alone_and_padded_in_a_batch(name, left, loaded):
    model, family = loaded[name]
    model = copy.deepcopy(model).double()
    ids, real = draw_rows(model, [11, 6, 3], left)
    where = real & (ids % 2 == 0)
    rows = masked_lm_logits(model, family, ids, real, where)
    changed = masked_lm_logits(model, family, torch.where(real, ids, 7), real, where)
    torch.testing.assert_close(changed, rows, atol=1e-5, rtol=0)
    alone = [masked_lm_logits(model, family, ids[i, real[i]][None], None, where[i, real[i]][None]) for i in range(3)]
    torch.testing.assert_close(rows, torch.cat(alone), atol=1e-5, rtol=0)


def test_positions_count_from_where_an_architecture_wants_them():
    config = RobertaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, family = RobertaForMaskedLM(config).eval(), TextFamily("masked_lm", 29)
    ids = torch.tensor([[1, 1, 5, 29, 9], [4, 5, 29, 9, 8]])  # 1 is RoBERTa's padding
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    rows = masked_lm_logits(model, family, ids, real, ids == 29)
    torch.testing.assert_close(rows[:1], model(ids[:1, 2:]).logits[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[1:], model(ids[1:]).logits[:, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WRITERS)
def test_only_the_wanted_positions_go_through_the_head(name, loaded):
    model, family = loaded[name]
    ids, real = draw_rows(model, [9, 9], left=True)
    where = ids % 3 == 0
    seen = []
    head = model.get_output_embeddings()
    weight = head.weight
    linear = torch.nn.functional.linear

    def counting(states, matrix, *bias):
        if matrix.shape == weight.shape:
            seen.append(tuple(states.shape))
        return linear(states, matrix, *bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counting)
        rows = masked_lm_logits(model, family, ids, real, where)
    assert seen == [(int(where.sum()), weight.shape[1])]
    everywhere = masked_lm_logits(model, family, ids, real, torch.ones_like(where))
    torch.testing.assert_close(rows, everywhere[where.flatten()], atol=1e-5, rtol=0)
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("name", ["dream", "shifted sdar"])
def test_shifted_predictions_are_read_one_token_before(name, loaded):
    model, family = loaded[name]
    ids, real = draw_rows(model, [8, 5], left=True)
    plain = TextFamily(**{**vars(family), "shifted": False})
    direct = masked_lm_logits(model, plain, ids, real, torch.ones_like(real)).view(2, 8, -1)
    shifted = masked_lm_logits(model, family, ids, real, real)
    expected = torch.cat([direct[0, :1], direct[0, :-1], direct[1, 3:4], direct[1, 3:-1]])
    torch.testing.assert_close(shifted, expected, atol=1e-5, rtol=0)


def test_later_blocks_are_not_seen(loaded):
    model, family = loaded["sdar"]
    ids, real = draw_rows(model, [12, 10], left=True)
    where = torch.zeros_like(real)
    where[:, 2:6] = real[:, 2:6]
    rows = masked_lm_logits(model, family, ids, real, where)
    other = ids.clone()
    other[0, 8:], other[1, 6:] = 1, 2  # row 1 begins in column 2: its first block ends before column 6
    torch.testing.assert_close(masked_lm_logits(model, family, other, real, where), rows, atol=1e-5, rtol=0)
    other[0, 7] = (other[0, 7] + 1) % 256
    assert not torch.allclose(masked_lm_logits(model, family, other, real, where), rows, atol=1e-3)


def test_every_query_sees_a_key_and_none_sees_padding(loaded):
    """A softmax over nothing is NaN on some devices."""
    _, family = loaded["sdar"]
    real = torch.tensor([[False] * 6, [False, False, True, True, True, True], [True, True, True, True, False, False]])
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    seen = _visible(family, real, positions, real, positions)
    assert seen.any(-1).all()
    assert not (seen & ~real[:, None, :])[real].any()


# Caches


def run_blocks(
    model: Any, family: TextFamily, ids: torch.Tensor, real: torch.Tensor, blocks: list[tuple[int, int]], mode: str, packed: bool
) -> torch.Tensor:
    """Logits of random states of every block, each block then filled with other random tokens."""
    generator = torch.Generator().manual_seed(1)
    cache, ids, found = TextCache(model, family, mode, packed), ids.clone(), []
    for start, end in blocks:
        cache.begin_block(ids, real, start, end)
        before = cache.length
        for _ in range(2):
            rows = torch.randint(0, len(ids), (5,), generator=generator)
            states = torch.randint(0, 256, (5, end - start), generator=generator) % model.config.vocab_size
            where = (torch.rand(states.shape, generator=generator) < 0.6) & real[rows, start:end]
            found.append(cache.logits(states, rows, where))
            assert cache.length == before
        filled = torch.randint(0, 256, (len(ids), end - start), generator=generator) % model.config.vocab_size
        ids[:, start:end] = filled
    return torch.cat(found)


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=3),
    left=st.booleans(),
    start=st.integers(0, 8),
    width=st.sampled_from([3, 4, 8]),
)
def test_blocks_with_their_cache_are_those_without(name, loaded, lengths, left, start, width):
    model, family = loaded[name]
    ids, real = draw_rows(model, [19, *lengths], left)
    blocks = [(first, min(first + width, 19)) for first in range(start, 19, width)]
    none, exact, packed = (
        run_blocks(model, family, ids, real, blocks, mode, packed)
        for mode, packed in (("none", False), ("exact", False), ("exact", True))
    )
    torch.testing.assert_close(exact, none, atol=1e-4, rtol=0)
    torch.testing.assert_close(packed, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*NATIVE, "masked_lm", "shifted sdar"])
@pytest.mark.parametrize("mode", ["none", "exact"])
def test_a_cache_gives_the_logits_of_whole_rows(name, mode, loaded):
    model, family = loaded[name]
    if mode == "exact" and family.attention == "full":
        return
    ids, real = draw_rows(model, [12, 9], left=True)
    cache = TextCache(model, family, mode)
    cache.begin_block(ids, real, 6, 9)
    states = (ids[[0, 1, 1], 6:9] + torch.tensor([[0], [1], [2]])) % model.config.vocab_size
    rows, where = torch.tensor([0, 1, 1]), torch.tensor([[True, False, True]] * 3)
    whole, whole_where = ids[rows], torch.zeros(3, 12, dtype=torch.bool)
    whole[:, 6:9], whole_where[:, 6:9] = states, where
    expected = masked_lm_logits(model, family, whole, real[rows], whole_where)
    torch.testing.assert_close(cache.logits(states, rows, where), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("packed", [False, True])
def test_a_dual_cache_runs_the_block_alone(name, packed, loaded):
    model, family = loaded[name]
    ids, real = draw_rows(model, [12, 9], left=True)
    cache, seen = TextCache(model, family, "dual", packed), []
    with model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape))):
        cache.begin_block(ids, real, 5, 9)
        for rows in (torch.arange(2), torch.tensor([0, 0, 1])):
            cache.logits(ids[rows, 5:9], rows, torch.ones(len(rows), 4, dtype=torch.bool))
    width = 4 + family.shifted  # a shifted token is read one column before
    assert seen == [(2, 12), (2, 2 * width) if packed else (3, width)]


def test_a_block_of_the_models_own_runs_alone(loaded):
    model, family = loaded["sdar"]
    ids, real = draw_rows(model, [16, 13], left=False)
    cache, seen = TextCache(model, family, "exact"), []
    with model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape))):
        for start in (4, 8):
            cache.begin_block(ids, real, start, start + 4)
            cache.logits(ids[[0, 0, 1], start : start + 4], torch.tensor([0, 0, 1]), torch.ones(3, 4, dtype=torch.bool))
            assert cache.length == start
    assert seen == [(2, 4), (3, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize("mode", ["exact", "prefix", "dual"])
def test_what_is_kept_never_changes_by_reading(mode, loaded):
    model, family = loaded["sdar" if mode == "exact" else "dream"]
    ids, real = draw_rows(model, [12, 10], left=True)
    for packed in (False, True):
        cache = TextCache(model, family, mode, packed)
        cache.begin_block(ids, real, 6, 10)
        all_of_it = torch.ones(4, 4, dtype=torch.bool)
        first = cache.logits(ids[[0, 1, 1, 0], 6:10], torch.tensor([0, 1, 1, 0]), all_of_it)
        kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache._kept.layers]
        again = cache.logits(ids[:, 6:10], torch.arange(2), all_of_it[:2])
        torch.testing.assert_close(again, first[:8], atol=1e-4, rtol=0)
        assert cache.length == kept[0][0].shape[-2] > 0
        for layer, (keys, values) in zip(cache._kept.layers, kept, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


def test_tokens_that_changed_behind_the_cache_are_computed_anew(loaded):
    model, family = loaded["sdar"]
    ids, real = draw_rows(model, [16, 14], left=True)
    cache = TextCache(model, family, "exact")
    cache.begin_block(ids, real, 12, 16)
    ids[:, 6] = (ids[:, 6] + 1) % 256
    rows, where = torch.arange(2), torch.ones(2, 4, dtype=torch.bool)
    for start, mask in ((12, real), (4, real), (12, real), (12, torch.ones_like(real))):
        cache.begin_block(ids, mask, start, start + 4)
        fresh = TextCache(model, family)
        fresh.begin_block(ids, mask, start, start + 4)
        block = ids[:, start : start + 4]
        torch.testing.assert_close(cache.logits(block, rows, where), fresh.logits(block, rows, where), atol=1e-4, rtol=0)


def test_equal_prompts_are_run_once_for_the_exact_cache(loaded):
    model, family = loaded["sdar"]
    ids, real = draw_rows(model, [12, 12, 10, 12, 12], left=True)
    ids[[1, 4], :8] = ids[0, :8]
    ids[2, 2:8] = ids[0, 2:8]  # but for its padding
    cache, none, seen = TextCache(model, family, "exact"), TextCache(model, family), []
    with model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape))):
        cache.begin_block(ids, real, 8, 12)
    assert seen == [(3, 8)]
    none.begin_block(ids, real, 8, 12)
    rows, where = torch.arange(5), torch.ones(5, 4, dtype=torch.bool)
    block = ids[:, 8:12]
    torch.testing.assert_close(cache.logits(block, rows, where), none.logits(block, rows, where), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["none", "exact"])
def test_rows_that_are_finished_can_be_dropped(mode, loaded):
    model, family = loaded["sdar"]
    ids, real = draw_rows(model, [12, 10, 9], left=True)
    cache, whole = TextCache(model, family, mode), TextCache(model, family)
    cache.begin_block(ids, real, 4, 8)
    kept = torch.tensor([2, 0])
    cache.keep_samples(kept)
    where = torch.ones(2, 4, dtype=torch.bool)
    for start in (4, 8):
        whole.begin_block(ids, real, start, start + 4)
        block = ids[kept, start : start + 4]
        expected = whole.logits(block, kept, where & real[kept, start : start + 4])
        found = cache.logits(block, torch.arange(2), where & real[kept, start : start + 4])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        if start == 4:
            cache.begin_block(ids[kept], real[kept], 8, 12)


# The approximation


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("mode", ["prefix", "dual"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("whole_first", [True, False])
def test_an_approximate_cache_is_exact_for_what_it_was_made_of(name, mode, packed, left, whole_first, loaded):
    model, family = loaded[name]
    ids, real = draw_rows(model, [14, 9], left)
    cache, none = TextCache(model, family, mode, packed), TextCache(model, family)
    for start in (0, 4, 8, 10):
        cache.begin_block(ids, real, start, start + 4)
        none.begin_block(ids, real, start, start + 4)
        for rows in (torch.arange(2), torch.tensor([1, 0, 1])) if whole_first else (torch.tensor([1, 0, 1]), torch.arange(2)):
            block, where = ids[rows, start : start + 4], real[rows, start : start + 4]
            torch.testing.assert_close(cache.logits(block, rows, where), none.logits(block, rows, where), atol=1e-4, rtol=0)
            num_behind = 14 - (start + 4) if mode == "dual" else 0
            assert cache.length == max(start - family.shifted, 0) + num_behind
        ids[:, start : start + 4] = (ids[:, start : start + 4] + 1) % model.config.vocab_size


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_the_first_call_of_a_block_may_be_about_other_tokens_and_rows(mode, packed, loaded):
    model, family = loaded["llada"]
    ids, real = draw_rows(model, [14, 14], left=True)
    ids[1, 8:12] = ids[0, 8:12]
    changed = ids[:, 8:12].roll(1, -1)
    for block, rows in ((ids[:, 8:12], torch.tensor([1, 0])), (changed, torch.arange(2))):
        cache, none = TextCache(model, family, mode, packed), TextCache(model, family)
        for one in (cache, none):
            one.begin_block(ids, real, 8, 12)
        where = torch.ones(2, 4, dtype=torch.bool)
        first = cache.logits(block, rows, where)
        again = cache.logits(block, rows, where)
        torch.testing.assert_close(first, again, atol=1e-4, rtol=0)
        if block is not changed:
            torch.testing.assert_close(first, none.logits(block, rows, where), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_the_error_of_an_approximate_cache(mode, loaded, record_property):
    """One changed token of a block: what the rest of the block is told, with what was kept before and without a cache."""
    for name in FULL:
        model, family = loaded[name]
        ids, real = draw_rows(model, [20], left=True)
        cache, none = TextCache(model, family, mode), TextCache(model, family)
        for one in (cache, none):
            one.begin_block(ids, real, 12, 16)
        block, where = ids[:, 12:16].clone(), torch.tensor([[False, True, True, True]])
        unchanged = none.logits(block, torch.tensor([0]), where)
        block[:, 0] = (block[:, 0] + 1) % model.config.vocab_size
        approximate, exact = (one.logits(block, torch.tensor([0]), where) for one in (cache, none))
        error, effect = ((value - exact).square().mean().sqrt().item() for value in (approximate, unchanged))
        record_property(f"{name}: error of the {mode} cache, of an effect, in logits", f"{error:.3g} of {effect:.3g}")
        assert 1e-4 < error < 2 * effect
        ids[:, 12:16] = block
        cache.begin_block(ids, real, 12, 16)
        torch.testing.assert_close(cache.logits(block, torch.tensor([0]), where), exact, atol=1e-4, rtol=0)


# Errors


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("sdar", {"mode": "block"}, "`mode` must be one of none, exact, prefix, dual, got 'block'"),
        ("dream", {"mode": "exact"}, "`mode` must be none or prefix or dual for dream, got 'exact'"),
        ("sdar", {"mode": "prefix"}, "`mode` must be none or exact for sdar, got 'prefix'"),
        ("sdar", {"mode": "dual"}, "`mode` must be none or exact for sdar, got 'dual'"),
        ("masked_lm", {"mode": "prefix"}, "`mode` must be none for masked_lm, got 'prefix'"),
        ("masked_lm", {"mode": "exact"}, "`mode` must be none for masked_lm, got 'exact'"),
        ("sdar", {"packed": True}, "`packed` must be False without a cache, got True"),
    ],
)
def test_caches_that_do_not_go_with_a_model(name, arguments, text, loaded):
    with pytest.raises(ValueError, match=text):
        TextCache(*loaded[name], **arguments)


def test_calls_that_do_not_fit(loaded):
    cache = TextCache(*loaded["sdar"])
    ids = torch.zeros(2, 8, dtype=torch.long)
    block, rows = ids[:, :4], torch.arange(2)
    with pytest.raises(ValueError, match="`begin_block` must be called before `logits`"):
        cache.logits(block, rows, block == 0)
    with pytest.raises(ValueError, match="`begin_block` must be called before `keep_samples`"):
        cache.keep_samples(rows)
    with pytest.raises(ValueError, match="`start` and `end` must be columns of the 8, in order, got 4 and 9"):
        cache.begin_block(ids, None, 4, 9)
    cache = TextCache(*loaded["sdar"], "exact")
    cache.begin_block(ids, None, 4, 8)
    with pytest.raises(ValueError, match=r"`sequences` must keep the shape \(2, 8\), got \(2, 4\)"):
        cache.begin_block(block, None, 0, 4)
    with pytest.raises(ValueError, match=r"`states` must have the shape \(2, 4\), got \(2, 8\)"):
        cache.logits(ids, rows, block == 0)
    with pytest.raises(ValueError, match=r"`where` must have the shape \(2, 4\), got \(2, 8\)"):
        cache.logits(block, rows, ids == 0)
