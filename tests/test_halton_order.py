"""The sampler "halton" beside the published one."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate, count

import pytest
import torch
from helpers.sampling import make_scheduler, random_logits

from diffusers_infogain.rules import halton_order

# The first cells (row, column) of the published order, and its number of tokens in each of 32 steps.
FIRST_CELLS = {
    16: [(8, 5), (4, 10), (12, 1), (2, 7), (10, 12), (6, 3), (14, 8), (1, 14)],
    24: [(12, 8), (6, 16), (18, 2), (3, 10), (15, 18), (9, 5), (21, 13), (1, 21)],
}
COUNTS = {
    16: [5] * 7 + [6, 5, 5, 6, 5, 6, 5, 6, 6, 6, 6, 6, 7, 6, 7, 7, 8, 8, 8, 9, 10, 11, 14, 17, 41],
    24: [11, 11, 12, 11, 12, 12, 11, *[12] * 5, 13, 13, 12, 13, *[14] * 4, 15, 15, 17, 16, 18, 19, 21, 22, 25, 30, 39, 92],
}


def radical_inverse(index: int, base: int) -> Fraction:
    value, scale = Fraction(0), Fraction(1, base)
    while index:
        index, digit = divmod(index, base)
        value, scale = value + digit * scale, scale / base
    return value


@pytest.mark.parametrize("side", [16, 24])
def test_order_is_that_of_the_exact_sequence(side):
    cells: dict[tuple[int, int], None] = {}
    for index in count(1):
        cells.setdefault((int(radical_inverse(index, 2) * side), int(radical_inverse(index, 3) * side)))
        if len(cells) == side**2:
            break
    assert list(cells)[:8] == FIRST_CELLS[side]
    order = halton_order(side, side).argsort().tolist()
    assert order == [row * side + column for row, column in cells]


@pytest.mark.parametrize("side", [16, 24])
def test_steps_follow_the_order_with_the_published_counts(side):
    """The first step decodes one token more, the last one less: here what stays masked is rounded down, there what is decoded."""
    num, steps = side**2, 32
    expected = COUNTS[side].copy()
    expected[0], expected[-1] = expected[0] + 1, expected[-1] - 1
    assert sum(expected) == num
    ends = list(accumulate(expected))
    scheduler = make_scheduler(3, steps, sampler="halton", masking_schedule="arccos")
    tokens, rank = torch.full((1, num), 3), halton_order(side, side)
    for index, timestep in enumerate(scheduler.timesteps):
        logits = random_logits(1, num, 3, seed=index)
        tokens = scheduler.step(logits, timestep, tokens, generator=torch.Generator().manual_seed(index)).prev_sample
        assert torch.equal(tokens[0] != 3, rank < ends[index])
