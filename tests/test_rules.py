"""The registry of rules, and the Halton order; every rule against a plain version of it is in test_scheduling_rules.py."""

import math

import pytest
import torch

from diffusers_infogain import rules
from diffusers_infogain.choices import SAMPLER_DESCRIPTIONS
from diffusers_infogain.settings import SETTINGS
from diffusers_infogain.step import Memory


def test_every_sampler_has_its_line_and_every_rule_a_temperature():
    assert list(SAMPLER_DESCRIPTIONS) == list(rules.SAMPLERS)
    for name, rule in rules.RULES.items():
        assert rule.name == name
        assert SETTINGS[rule.temperature].type == "temperature"
    assert all(sampler.rule in rules.RULES for sampler in rules.SAMPLERS.values() if sampler.rule is not None)


def test_a_rule_of_an_existing_name_is_an_error():
    for name in ("margin", "info_gain", "klass_parallel"):
        with pytest.raises(ValueError, match=f"`name` must be the name of a new rule, got '{name}'"):
            rules.rule(name)


def test_memory_follows_its_samples_and_forgets_an_edited_state():
    state = {"logits": torch.arange(12.0).view(3, 2, 2), "steps": torch.arange(6).view(3, 2)}
    memory = Memory({"start": torch.tensor([4, 5, 6])}, state)
    taken = memory.take(torch.tensor([2, 0, 2]))
    assert taken.sample["start"].tolist() == [6, 4, 6]
    assert torch.equal(taken.state["logits"], state["logits"][[2, 0, 2]])
    assert taken.state["steps"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert memory.without_state() == Memory(memory.sample)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (4, 4), (3, 8), (8, 3), (16, 16), (12, 20)])
def test_halton_order_ranks_every_cell_once(height, width):
    rank = rules.halton_order(height, width)
    assert rank.sort().values.tolist() == list(range(height * width))


@pytest.mark.parametrize(("height", "width"), [(2, 3), (8, 9), (4, 27), (16, 9)])
def test_halton_order_puts_a_prefix_once_in_each_block(height, width):
    """Of a Halton sequence in bases 2 and 3, any 2^a · 3^b points in a row fall one into each of the 2^a × 3^b blocks."""
    cells = rules.halton_order(height, width).argsort()
    rows = 1
    while rows <= height:
        columns = 1
        while columns <= width:
            block = (cells // width // (height // rows)) * columns + cells % width // (width // columns)
            # the sequence starts with its point 1, so its first 2^a · 3^b - 1 points are in other blocks than point 0
            assert block[: rows * columns - 1].unique().numel() == rows * columns - 1
            columns *= 3
        rows *= 2


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (32, 32), (12, 20)])
def test_halton_order_spreads_its_beginning_over_the_grid(height, width):
    cells = rules.halton_order(height, width).argsort()
    for share in (4, 8):
        prefix = cells[: height * width // share]
        quadrant = (prefix // width >= height / 2) * 2 + (prefix % width >= width / 2)
        assert (quadrant.bincount(minlength=4) / len(prefix) - 0.25).abs().max() <= 0.1
        row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
        distance = (row[:, None] - row[prefix]).abs().maximum((column[:, None] - column[prefix]).abs()).amin(1)
        assert distance.max() <= math.isqrt(share) + 1


def test_halton_order_takes_rows_from_base_2_and_columns_from_base_3():
    # points 1, 2, 3: (1/2, 1/3), (1/4, 2/3), (3/4, 1/9)
    assert rules.halton_order(4, 9).argsort()[:3].tolist() == [2 * 9 + 3, 1 * 9 + 6, 3 * 9 + 1]
