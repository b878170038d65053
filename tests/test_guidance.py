"""Guidance: its strength in a state, the rows that it takes, and images that share theirs."""

from __future__ import annotations

import math
import re

import pytest
import torch

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.guidance import Rows, check_guidance, first_of_equal, guidance_weights, guide, number_conditions
from diffusers_infogain.masked_logits import MaskedLogits, replace_states, split_states

MASK = 10


def states(*decoded: int, length: int = 8) -> torch.Tensor:
    """A state for each number of decoded tokens."""
    return torch.where(torch.arange(length) < torch.tensor(decoded)[:, None], 3, MASK)


@pytest.mark.parametrize(
    ("schedule", "rise"),
    [("constant", lambda u: 1.0), ("linear", lambda u: u), ("cosine", lambda u: math.sin(math.pi * u / 2) ** 2)],
)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0, 0.5), (0.5, 1), (0.25, 0.375)])
def test_guidance_has_its_schedule_s_strength_inside_the_interval_and_is_off_outside(schedule, rise, interval):
    weights = guidance_weights(states(*range(9)), MASK, 4.0, schedule, interval).tolist()
    for decoded, weight in enumerate(weights):
        inside = interval[0] <= decoded / 8 < interval[1]
        assert weight == pytest.approx(1 + 3 * rise(decoded / 8), abs=1e-6) if inside else weight == 1.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("titok_linear", lambda i, total: 1 + 3 * i / total),
        ("titok_power_cosine", lambda i, total: 1 + 3 * math.sin(math.pi * (i / total) ** 3 / 2) ** 2),
        ("maskgen_linear", lambda i, total: 2 + 2 * (i + 1) / total),
        ("maskgen_cosine", lambda i, total: 2 + 2 * math.sin(math.pi * (i + 1) / total / 2) ** 2),
    ],
)
def test_published_schedules_go_by_steps(schedule, expected):
    scheduler = InfoGainScheduler(mask_token_id=MASK, masking_schedule="arccos", sampler="confidence")
    scheduler.set_timesteps(5)
    masks = [8, 6, 5, 4, 3]  # floor(8 · arccos(i / 5) · 2 / π)
    tokens = states(*(8 - number for number in masks), 8)

    def steps_done(tokens):
        return 5 - 1 - scheduler.timesteps_at(tokens), 5

    weights = guidance_weights(tokens, MASK, 4.0, schedule, (0, 1), steps_done)
    assert weights.tolist() == pytest.approx([*(expected(i, 5) for i in range(5)), 1.0], rel=1e-6)
    later = guidance_weights(tokens, MASK, 4.0, schedule, (0.3, 0.6), steps_done)
    assert torch.equal(later[2:4], weights[2:4])
    assert later[[0, 1, 4, 5]].tolist() == [1.0] * 4
    assert guidance_weights(tokens, MASK, 1.0, schedule, (0, 1), steps_done).tolist() == [1.0] * 6
    with pytest.raises(
        ValueError, match=f"`steps_done` must be given for the guidance schedule '{schedule}', which goes by steps"
    ):
        guidance_weights(tokens, MASK, 4.0, schedule, (0, 1))


def test_intervals_that_meet_guide_every_state_once():
    every = guidance_weights(states(*range(8)), MASK, 3.0, "constant", (0, 1)) - 1
    parts = [guidance_weights(states(*range(8)), MASK, 3.0, "constant", ends) - 1 for ends in ((0, 0.5), (0.5, 0.75), (0.75, 1))]
    assert torch.equal(sum(parts), every)


def test_a_rising_guidance_begins_at_1_exactly():
    for schedule in ("linear", "cosine"):
        assert guidance_weights(states(0), MASK, 7.3, schedule, (0, 1)).tolist() == [1.0]


@pytest.mark.parametrize("masked_only", [False, True])
def test_logits_are_extrapolated_state_by_state(masked_only):
    tokens = states(2, 5)
    cond, uncond = torch.randn(2, 2, 8, 10, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    weights = torch.tensor([1.5, 4.0])
    where = tokens == MASK
    if masked_only:
        guided = guide(MaskedLogits.at(where, cond[where]), MaskedLogits.at(where, uncond[where]), weights).dense()[where]
    else:
        guided = guide(cond, uncond, weights)[where]
    assert guided.dtype == torch.float32
    expected = torch.stack([uncond[i].float() + weights[i] * (cond[i].float() - uncond[i].float()) for i in range(2)])
    assert torch.equal(guided, expected[where])


def test_the_first_of_equal_rows_stand_for_all():
    rows = torch.randint(0, 2, (40, 4), generator=torch.Generator().manual_seed(0))
    first, number = first_of_equal(rows)
    assert len(first) == 16 < len(rows)
    assert first.tolist() == sorted(first.tolist())
    for place, row in enumerate(rows.tolist()):
        assert first[number[place]] == rows.tolist().index(row)


def test_rows_are_shared_by_equal_states_under_equal_conditions_only():
    tokens = states(0, 0, 2, 0, 2)
    rows = Rows.of(tokens, torch.tensor([0, 1, 0, 0, 0]))
    assert rows.state.tolist() == [0, 1, 2]
    assert rows.number.tolist() == [0, 1, 2, 0, 2]


def test_conditions_are_equal_if_all_their_tensors_are():
    floats = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    floats[2] = floats[3] = floats[0]
    condition = {"a": floats, "b": torch.tensor([1, 1, 1, 2]), "c": torch.tensor([[True], [True], [True], [True]])}
    assert number_conditions(condition).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("masked_only", [False, True])
def test_states_are_split_and_replaced(masked_only):
    tokens = states(3, 0, 8, 6)
    dense = torch.randn(4, 8, 5, generator=torch.Generator().manual_seed(0)) * (tokens == MASK)[..., None]
    logits = MaskedLogits.at(tokens == MASK, dense[tokens == MASK]) if masked_only else dense

    def full(part):
        return part.dense() if masked_only else part

    for size in range(5):
        first, rest = split_states(logits, size)
        assert torch.equal(full(first), dense[:size])
        assert torch.equal(full(rest), dense[size:])
    others = split_states(logits, 2)[1]
    index = torch.tensor([0, 3])
    assert torch.equal(full(replace_states(logits, index, others)), dense[[2, 1, 2, 3]])
    assert replace_states(others, torch.arange(2), others) is others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": math.inf}, "`guidance_scale` must be a number in [-1e+06, 1e+06], got inf."),
        (
            {"guidance_schedule": "steep"},
            "`guidance_schedule` must be one of constant, linear, cosine, titok_linear, ",
        ),
        ({"guidance_interval": (0.5, 0.5)}, "`guidance_interval` must be a pair (start, stop) with 0 <= start < stop <= 1, got "),
        ({"guidance_interval": (0, 1.5)}, "`guidance_interval` must be a pair (start, stop) with 0 <= start < stop <= 1, got "),
        ({"guidance_interval": 0.5}, "`guidance_interval` must be a pair (start, stop) with 0 <= start < stop <= 1, got 0.5."),
        ({"guidance_interval": ("a", "b")}, "`guidance_interval` must be a pair (start, stop) with 0 <= start < stop <= 1, got "),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_guidance(**arguments)
