"""How often tokens occur in a text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain.token_frequencies import save_token_frequencies, token_frequencies


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6)), min_size=1).filter(any))
def test_token_frequencies_are_shares_of_all_tokens(sequences):
    every = [token for sequence in sequences for token in sequence]
    expected = [every.count(token) / len(every) for token in range(7)]
    assert token_frequencies(iter(sequences), 7).tolist() == pytest.approx(expected)


def test_frequencies_that_cannot_be_built_or_saved_are_an_error(tmp_path):
    for sequences, message in (
        ([[0, 7]], r"`token_ids` must be in \[0, 7\), got 7"),
        ([[-1]], r"`token_ids` must be in \[0, 7\), got -1"),
        ([[], []], "`token_ids` must hold at least one token, got none"),
        ([[1.7, 2.2]], "`token_ids` must be sequences of integers, got torch.float32 of 1 dimensions"),
        ([[[1], [2]]], "`token_ids` must be sequences of integers, got torch.int64 of 2 dimensions"),
        ([1, 2], "`token_ids` must be sequences of token ids, got others"),
        (["ab"], "`token_ids` must be sequences of token ids, got others"),
    ):
        with pytest.raises(ValueError, match=message):
            token_frequencies(sequences, 7)
    with pytest.raises(ValueError, match="`vocab_size` must be an integer >= 1, got 0"):
        token_frequencies([[0]], 0)
    for frequencies, message in (
        (torch.ones(3).double(), r"`frequencies` must be float32 of shape \(V,\), got torch.float64 \(3,\)"),
        (torch.ones(3, 1), r"`frequencies` must be float32 of shape \(V,\), got torch.float32 \(3, 1\)"),
        (torch.zeros(3), "`frequencies` must be numbers in"),
        (torch.tensor([1.0, -0.1]), "`frequencies` must be numbers in"),
    ):
        with pytest.raises(ValueError, match=message):
            save_token_frequencies(frequencies, tmp_path / "f.safetensors")
    assert list(tmp_path.iterdir()) == []
