import math

import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler
from helpers.sampling import make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain.schedules import (
    annealed,
    decode_counts,
    mask_ratio,
    planned_masks,
    release_probability,
    share_masked_after,
)
from diffusers_infogain.settings import MASKING_SCHEDULES

schedule_names = st.sampled_from(MASKING_SCHEDULES)
PACED = [name for name in MASKING_SCHEDULES if name != "dream"]
"""With at least one token a step."""
paced_names = st.sampled_from(PACED)


def run_counts(initial: list[int], steps: int, schedule: str, **options) -> list[list[int]]:
    """The counts of every step, for samples with `initial` masks each."""
    masks = torch.tensor(initial)
    left, counts = masks, []
    for index in range(steps):
        counts.append(decode_counts(left, index, steps, schedule, initial_masks=masks, **options))
        left = left - counts[-1]
    return torch.stack(counts).tolist()


def ratio(u: float, schedule: str) -> float:
    others = {"arccos": 2 * math.acos(u) / math.pi, "dream": 1 - 0.999 * u if u < 1 else 0.0}
    return {"cosine": math.cos(math.pi * u / 2), **others}.get(schedule, 1 - u)


def masked_counts(scheduler, length: int) -> list[int]:
    """How many tokens are masked after each step of a scheduler that starts from an empty canvas."""
    tokens, left = torch.full((1, length), 3), []
    for timestep in scheduler.timesteps:
        generator = torch.Generator().manual_seed(int(timestep))
        tokens = scheduler.step(torch.zeros(1, length, 3), timestep, tokens, generator=generator).prev_sample
        left.append(int((tokens == 3).sum()))
    return left


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 80), min_size=1, max_size=5), st.integers(1, 100), schedule_names, st.none() | st.integers(1, 9))
def test_no_mask_is_left_and_none_decoded_twice(initial, steps, schedule, tokens_per_step):
    counts = torch.tensor(run_counts(initial, steps, schedule, tokens_per_step=tokens_per_step))
    assert counts.sum(0).tolist() == initial
    assert (counts >= 0).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 80), min_size=1, max_size=5),
    st.integers(1, 100),
    st.sampled_from(PACED),
    st.none() | st.integers(1, 9),
)
def test_counts_sum_to_the_masks_with_at_least_one_a_step_and_none_left(initial, steps, schedule, tokens_per_step):
    counts = torch.tensor(run_counts(initial, steps, schedule, tokens_per_step=tokens_per_step))
    left_before = torch.tensor(initial) - counts.cumsum(0) + counts
    assert counts.sum(0).tolist() == initial
    assert (counts >= left_before.clamp(max=1)).all()
    assert (counts <= left_before).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 80), min_size=2, max_size=5), st.integers(1, 40), schedule_names, st.none() | st.integers(1, 9))
def test_each_sample_counts_its_own_masks(initial, steps, schedule, tokens_per_step):
    together = run_counts(initial, steps, schedule, tokens_per_step=tokens_per_step)
    alone = [run_counts([masks], steps, schedule, tokens_per_step=tokens_per_step) for masks in initial]
    assert together == [[counts[step][0] for counts in alone] for step in range(steps)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 100), st.sampled_from(["cosine", "linear", "arccos"]))
def test_after_each_step_the_floor_of_the_schedule_is_left(masks, steps, schedule):
    left = masks
    for index, (count,) in enumerate(run_counts([masks], steps, schedule)[:-1]):
        exact = masks * ratio((index + 1) / steps, schedule)
        # float32 may put a whole number on either side of its floor
        expected = {min(math.floor(value), left - 1) if left else 0 for value in (exact - 1e-4, exact + 1e-4)}
        left -= count
        assert left in expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 100), st.booleans())
def test_even_counts_are_those_of_published_loops_for_text(masks, steps, told):
    steps = min(steps, masks)
    base, rest = divmod(masks, steps)
    left, counts = torch.tensor([masks]), []
    for index in range(steps):
        counts.append(decode_counts(left, index, steps, "even", initial_masks=torch.tensor([masks]) if told else None))
        left = left - counts[-1]
    assert [int(count) for count in counts] == [base + (index < rest) for index in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("length", "steps"), [(1, 1), (7, 6), (16, 4), (16, 12), (16, 16), (64, 12), (64, 25), (100, 64), (256, 50)]
)
def test_empty_canvas_counts_equal_amused(schedule, length, steps):
    """A drop-in replacement leaves as many masks as the original, which is never told the number of masks at the start."""
    stock = AmusedScheduler(mask_token_id=3, masking_schedule=schedule)
    stock.set_timesteps(steps)
    expected = masked_counts(stock, length)
    own = make_scheduler(3, steps, sampler="confidence", masking_schedule=schedule)
    assert masked_counts(own, length) == expected
    counts = torch.tensor(run_counts([length], steps, schedule))[:, 0]
    assert (length - counts.cumsum(0)).tolist() == expected


@pytest.mark.parametrize("schedule", MASKING_SCHEDULES)
def test_ratio_follows_its_formula_from_one_to_zero(schedule):
    u = torch.linspace(0, 1, 65)
    expected = torch.tensor([ratio(value, schedule) for value in u.tolist()])
    torch.testing.assert_close(mask_ratio(u, schedule), expected, atol=2e-6, rtol=0)
    assert mask_ratio(u[:1], schedule).item() == 1


def test_arccos_starts_slower_than_linear_and_ends_faster():
    arccos = [counts[0] for counts in run_counts([100], 10, "arccos")]
    assert arccos[0] < 10 < arccos[-1]
    assert [100 - sum(arccos[: i + 1]) for i in range(9)] == [
        math.floor(200 / math.pi * math.acos((i + 1) / 10)) for i in range(9)
    ]


@pytest.mark.parametrize(("steps", "expected"), [(6, [3, 3, 3, 3, 1, 0]), (4, [3, 3, 3, 4]), (2, [3, 10]), (1, [13])])
def test_tokens_per_step_is_constant_and_the_last_step_takes_the_rest(steps, expected):
    assert [count for (count,) in run_counts([13], steps, "cosine", tokens_per_step=3)] == expected


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(1, 100))
def test_dreams_counts_are_those_of_its_published_loop(masks, steps):
    """A share 1 - s/t of what is left, rounded down, in float32 as there: a whole number may just be missed."""
    times = [np.float32(value) for value in np.linspace(1, 0.001, steps + 1)]
    left = masks
    for index, (count,) in enumerate(run_counts([masks], steps, "dream")):
        share = 1 - float(times[index + 1]) / float(times[index])
        exact = [math.floor(left * share * (1 + error)) for error in (-1e-5, 1e-5)] if index < steps - 1 else [left]
        assert count in exact
        left -= count
    assert left == 0


def test_dreams_first_step_may_decode_nothing_and_its_last_one_more_than_its_share():
    counts = [count for (count,) in run_counts([12], 5, "dream")]
    assert counts == [2, 2, 2, 2, 4]
    counts = [count for (count,) in run_counts([64], 64, "dream")]
    assert counts[0] == 0
    assert counts[1:-1] == [1] * 62
    assert counts[-1] == 2


@pytest.mark.parametrize("schedule", MASKING_SCHEDULES)
@pytest.mark.parametrize(("tokens_per_step", "steps"), [(None, 5), (4, 7), (4, 2), (9, 1)])
def test_shares_released_one_after_the_other_leave_what_the_schedule_leaves(schedule, tokens_per_step, steps):
    left = 1.0
    for index in range(steps):
        left *= 1 - release_probability(index, steps, schedule, tokens_per_step=tokens_per_step, length=24)
        expected = share_masked_after(index, steps, schedule, tokens_per_step=tokens_per_step, length=24)
        assert left == pytest.approx(float(expected), abs=1e-6)
    assert left == 0


@pytest.mark.parametrize("schedule", PACED)
def test_more_steps_than_tokens_decode_one_a_step(schedule):
    counts = [count for (count,) in run_counts([5], 40, schedule)]
    assert sum(counts) == 5
    assert max(counts[:-1]) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 60), schedule_names)
def test_empty_canvas_needs_no_initial_masks(length, steps, schedule):
    left, counts = torch.tensor([length]), []
    for index in range(steps):
        counts.append(decode_counts(left, index, steps, schedule, max_masks=torch.tensor([length])))
        left = left - counts[-1]
    assert [int(count) for count in counts] == [count for (count,) in run_counts([length], steps, schedule)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(0, 60), st.sampled_from(["cosine", "linear"]), st.data())
def test_without_initial_masks_a_count_is_right_to_within_one_token(masks, known, schedule, data):
    steps = data.draw(st.integers(1, masks))
    left = masks
    for index, (count,) in enumerate(run_counts([masks], steps, schedule)):
        inferred = decode_counts(torch.tensor([left]), index, steps, schedule, max_masks=torch.tensor([masks + known]))
        assert abs(int(inferred) - count) <= 1
        left -= count


def test_the_first_step_needs_no_initial_masks_for_partly_filled_canvases():
    masks = torch.arange(1, 60)
    for schedule in MASKING_SCHEDULES:
        told = decode_counts(masks, 0, 9, schedule, initial_masks=masks)
        assert torch.equal(decode_counts(masks, 0, 9, schedule, max_masks=torch.full_like(masks, 64)), told)


def test_unknown_schedule_is_named_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"`masking_schedule` must be one of cosine, linear, arccos, even, dream, got 'sqrt'"):
        mask_ratio(torch.tensor(0.5), "sqrt")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("length", "steps"), [(16, 1), (16, 5), (64, 12), (5, 5)])
def test_planned_masks_are_those_that_every_step_finds(schedule, length, steps):
    left, found = torch.tensor([length]), []
    for index in range(steps):
        found.append(left.item())
        left = left - decode_counts(left, index, steps, schedule, initial_masks=torch.tensor([length]))
    assert planned_masks(length, steps, schedule).tolist() == found
    assert found == sorted(set(found), reverse=True)
    assert left.item() == 0


@given(st.integers(1, 64), st.floats(0, 5), st.floats(0, 5))
def test_temperatures_reach_their_end_and_the_product_is_never_slower(steps, start, end):
    even, faster = (annealed((start, end), steps, how) for how in ("linear", "product"))
    assert faster[-1].item() == pytest.approx(end)
    assert steps == 1 or even[-1].item() == pytest.approx(end)
    assert ((faster - end).abs() <= (even - end).abs() + 1e-5).all() or steps == 1
    expected = [end + (start - end) * math.prod(1 - j / steps for j in range(1, i + 2)) for i in range(steps)]
    torch.testing.assert_close(faster, torch.tensor(expected))
