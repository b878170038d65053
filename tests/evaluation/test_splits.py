"""The parts of an evaluation."""

import pytest

from diffusers_infogain.choices import SPLITS
from diffusers_infogain.evaluation import splits


def test_splits_are_equal_and_the_same_everywhere():
    parts = [splits.split_of(f"{number}") for number in range(3000)]
    assert all(abs(parts.count(split) - 1000) < 100 for split in SPLITS)
    assert parts[:6] == ["choose", "report", "report", "report", "report", "final"]


def test_no_two_splits_share_a_seed():
    seeds = [splits.seed_of_split(seed, split) for split in (None, *SPLITS) for seed in range(splits.SEEDS_PER_SPLIT)]
    assert seeds == list(range(4 * splits.SEEDS_PER_SPLIT))
    assert splits.seed_of_split(10**12, None) == 10**12


@pytest.mark.parametrize("seed", [-1, 1000])
def test_a_seed_of_another_split_is_an_error(seed):
    with pytest.raises(ValueError, match=f"`seeds` must be from 0 to 999 with the split 'final', got {seed}"):
        splits.seed_of_split(seed, "final")
