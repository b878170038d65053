import itertools
import math

import pytest
import torch
from helpers.sampling import EAGER

from diffusers_infogain.evaluation import exact
from diffusers_infogain.evaluation.exact import SamplerSetting


def plain_valid(grid: list[int]) -> bool:
    cells = range(4)
    groups = [[grid[4 * r + c] for c in cells] for r in cells] + [[grid[4 * r + c] for r in cells] for c in cells]
    groups += [[grid[4 * (r + i) + c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
    return all(sorted(group) == [0, 1, 2, 3] for group in groups)


def test_there_are_288_sudokus_all_valid_and_distinct():
    grids = exact.sudoku_tokens()
    assert grids.shape == (288, 16)
    assert len(grids.unique(dim=0)) == 288
    assert all(plain_valid(grid) for grid in grids.tolist())
    assert exact.is_valid_sudoku(grids).all()


def test_validity_equals_brute_force_on_damaged_and_random_grids():
    generator = torch.Generator().manual_seed(0)
    grids = exact.sudoku_tokens().repeat(2, 1)
    changed = torch.randint(16, (len(grids), 2), generator=generator)
    swapped = grids.scatter(1, changed, grids.gather(1, changed.flip(1)))  # some swap equal digits and stay valid
    latin = torch.tensor([[(r + s[c]) % 4 for r in range(4) for c in range(4)] for s in itertools.permutations(range(4))])
    tested = torch.cat([swapped, latin, torch.randint(4, (50, 16), generator=generator)])
    expected = [plain_valid(grid) for grid in tested.tolist()]
    assert exact.is_valid_sudoku(tested).tolist() == expected
    assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("sharpness", [0.0, 1.5, 6.0])
def test_model_is_the_posterior_over_the_set(sharpness):
    generator = torch.Generator().manual_seed(1)
    sequences, tokens = (torch.randint(high, (9, 5), generator=generator) for high in (3, 4))  # 3 is the mask
    logits = exact.exact_denoise(sequences, 3, sharpness)(tokens, torch.arange(9))
    for state, found in zip(tokens.tolist(), logits.exp().tolist(), strict=True):
        weights = [math.exp(sharpness * sum(a == b for a, b in zip(state, x, strict=True))) for x in sequences.tolist()]
        for position in range(5):
            for token in range(3):
                share = sum(w for w, x in zip(weights, sequences.tolist(), strict=True) if x[position] == token)
                assert found[position][token] == pytest.approx(share / sum(weights), abs=1e-5)


def test_tokens_that_no_sequence_has_are_ruled_out():
    logits = exact.exact_denoise(torch.tensor([[0, 1], [0, 2]]), 3, 2.0)(torch.tensor([[3, 3]]), torch.tensor([0]))
    assert torch.isneginf(logits[0]).tolist() == [[False, True, True], [True, False, False]]


def test_nearest_distance_counts_the_positions_that_differ_from_the_closest():
    sequences = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    assert exact.nearest_distance(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]]), sequences).tolist() == [0, 1, 2]


def test_the_energy_distance_is_that_of_the_plain_double_sums_and_tells_sameness_from_quality():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(2, (7, 5), generator=generator), torch.randint(3, (6, 5), generator=generator)

    def mean(a, b, skip=False):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return sum((a[i] != b[j]).sum().item() for i, j in pairs) / len(pairs)

    assert exact.energy_distance(x, y) == pytest.approx(2 * mean(x, y) - mean(x, x, skip=True) - mean(y, y))
    grids = exact.sudoku_tokens()
    drawn = grids[torch.randint(288, (300,), generator=generator)]
    assert abs(exact.energy_distance(drawn, grids)) < 0.1
    assert exact.energy_distance(grids[:1].expand(300, 16), grids) > 5


def test_digits_have_four_grey_levels():
    digits = exact.digit_images()
    assert digits.shape == (1797, 64)
    assert digits.unique().tolist() == [0, 1, 2, 3]


FIXED = EAGER | {"sampler": "info_gain", "num_candidates": 8, "entropy_bound": 0}


def test_synonymous_codes_share_the_probability_of_their_token():
    images = exact.digit_images()
    plain = exact.exact_denoise(images, 4, 1.5)
    codes = exact.synonymous_denoise(plain, (1, 3, 2, 1))
    state = torch.tensor([[0, 2, 5, 7] + [7] * 60])  # tokens 0, 1, 2, masked
    rows = torch.tensor([0])
    levels = plain(torch.tensor([[0, 1, 2, 4] + [4] * 60]), rows).exp()[0]
    found = codes(state, rows).exp()[0]
    assert found.shape == (64, 7)
    torch.testing.assert_close(found.sum(-1), torch.ones(64), atol=1e-4, rtol=0)
    for level, (first, count) in enumerate(((0, 1), (1, 3), (4, 2), (6, 1))):
        torch.testing.assert_close(
            found[:, first : first + count], levels[:, level, None].expand(64, count) / count, atol=1e-4, rtol=0
        )


def test_kl_does_not_see_synonyms_where_the_fall_of_entropy_is_drawn_to_the_background():
    def distance(reduction: str, num_codes) -> float:
        task = exact.digits_task(8, num_codes)
        setting = SamplerSetting("", FIXED | {"certainty": "uniform", "gain_reduction": reduction})
        return task.run(setting, 100).energy_distance

    for reduction, least, most in (("sum", 2, 99), ("kl", -1, 1)):
        plain, noisy = distance(reduction, (1, 1, 1, 1)), distance(reduction, exact.SYNONYMS)
        assert least < noisy - plain < most


def quality(task: exact.ExactTask, num_samples: int = 200, **config) -> float:
    return task.run(SamplerSetting("", config), num_samples).quality


def test_looking_ahead_keeps_sudokus_valid_where_greedy_rules_do_not():
    task = exact.sudoku_task(2)
    assert quality(task, sampler="entropy") < 0.4
    assert quality(task, **FIXED | {"gain_reduction": "sum"}) > 0.95
    assert quality(task, **FIXED | {"gain_reduction": "mean", "certainty": "confidence"}) > 0.95


def test_looking_ahead_comes_at_least_three_times_closer_to_real_digits_than_any_greedy_rule():
    task = exact.digits_task(8)
    rules = ("uniform", "confidence", "maskgit", "entropy", "margin", "halton", "klass")
    greedy = min(quality(task, 100, sampler=rule) for rule in rules)
    assert quality(task, 100, **FIXED | {"gain_reduction": "sum"}) <= greedy / 3


def test_at_equal_rows_looking_ahead_with_an_entropy_bound_comes_closer_to_real_digits_than_greedy_rules():
    task = exact.digits_task(8)
    bounded = {"num_candidates": 4, "entropy_bound": 3.0, **EAGER, "gain_reduction": "sum"}
    ours = task.run(SamplerSetting("", bounded, one_by_one=True), 100)
    rivals = [
        task.run(SamplerSetting("", {"sampler": "maskgit"}, one_by_one=True), 100),
        task.run(SamplerSetting("", {"sampler": "maskgit", "entropy_bound": 0.25}, one_by_one=True), 100),
        task.run(SamplerSetting("", {"sampler": "maskgit"}, num_runs=4), 100),
    ]
    assert all(ours.num_evaluations < rival.num_evaluations for rival in rivals)
    assert all(ours.quality < 0.7 * rival.quality for rival in rivals)


def test_an_entropy_bound_saves_rows_and_keeps_the_quality_of_decoding_one_by_one():
    task = exact.sudoku_task(4)
    full = task.run(SamplerSetting("", {"sampler": "maskgit"}, one_by_one=True), 200)
    bounded = task.run(SamplerSetting("", {"sampler": "maskgit", "entropy_bound": 0.05}, one_by_one=True), 200)
    assert full.num_evaluations == 16
    assert bounded.num_evaluations < 10
    assert min(full.quality, bounded.quality) > 0.97


def test_several_seeds_are_pooled():
    task, setting = exact.sudoku_task(4), SamplerSetting("", {"sampler": "maskgit"})
    one, other, both = (task.run(setting, 30, seeds) for seeds in ([0], [1], [0, 1]))
    assert both.samples == 60
    assert both.quality == pytest.approx((one.quality + other.quality) / 2)
    assert both.distinct == (one.distinct + other.distinct) / 2


def test_results_tell_rows_entropy_and_diversity():
    result = exact.sudoku_task(4).run(SamplerSetting("margin", {"sampler": "margin"}), 30)
    assert (result.name, result.samples, result.num_evaluations) == ("margin", 30, 4)
    assert 1 < result.distinct <= 30
    assert result.cumulative_entropy > math.log(288) / 2
    assert "| margin | " in exact.format_table("title", [result])
