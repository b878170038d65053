from __future__ import annotations

import numpy as np
import pytest
from helpers.comparison import measured, result

from diffusers_infogain.evaluation import groups
from diffusers_infogain.evaluation.groups import RIGHT, Quality
from diffusers_infogain.evaluation.image_comparison import image_groups


def test_seeds_are_pooled_with_errors_over_prompts():
    runs = [result("a", 2, 2, "1100", seed=0), result("a", 2, 2, "1000", seed=1, seconds_per_image=0.3)]
    (group,) = image_groups(runs)
    assert group.seeds == [0, 1]
    means = np.array([1.0, 0.5, 0.0, 0.0])
    assert group.figures["right"].value == means.mean()
    assert group.figures["right"].standard_error == pytest.approx(means.std(ddof=1) / 2)
    assert group.figures["right"].n == 8
    assert group.figures["seconds_per_image"].value == pytest.approx(0.2)
    assert "peak_memory" not in group.figures


def test_a_difference_is_paired_by_prompt_and_seed():
    first, second = image_groups([result("a", 2, 2, "1110"), result("b", 2, 2, "1100"), result("b", 2, 2, "0000", seed=1)])
    gap = groups.difference(first, second)
    gaps = np.array([0, 0, 1, 0])
    assert gap.value == gaps.mean()
    assert gap.standard_error == pytest.approx(gaps.std(ddof=1) / 2)
    other_seed = image_groups([result("c", 2, 2, "1111", seed=5)])[0]
    assert groups.difference(first, other_seed) is None


def test_the_rival_may_take_other_steps_bounds_and_runs_as_long_as_it_costs_no_more():
    found = image_groups(
        [
            result("margin", 4, 4, "1000"),
            result("entropy", 4, 4, "1100"),
            result("margin:entropy_bound=1", 64, 6, "1100", sequential_passes=6),
            result("entropy:num_runs=8", 4, 32, "1111"),
            result("margin:num_runs=4", 6, 16, "1111"),
            result("margin", 16, 16, "1110"),
            result("margin", 32, 32, "1111"),
            result("info_gain", 4, 16.1, "1110", num_candidates=5),
            result("margin", 4, 4, "1111", guidance_scale=2.0),
        ]
    )
    ours = next(group for group in found if group.looks_ahead)

    def best(*limits):
        return groups.best_greedy(found, ours, RIGHT, same=["guidance_scale"], limits=limits).label

    assert best("num_evaluations", "sequential_passes") == "entropy"
    assert best("num_evaluations") == "margin:num_runs=4"
    assert best() == "margin"  # without limits searches would win by what they cost
    with pytest.raises(ValueError, match=r"`limits` must be among the figures right, .*sequential_passes, .*, got 'time'"):
        best("time")


def test_the_pareto_front_holds_what_no_cheaper_group_beats():
    runs = [result(name, rows, rows, right) for name, rows, right in (("a", 2, "1000"), ("b", 4, "1000"), ("c", 8, "1100"))]
    found = image_groups([*runs, result("d", 8, 8, "1110")])
    assert [group["sampler"] for group in groups.pareto_front(found, RIGHT)] == ["a", "d"]


def test_samplers_are_ranked_by_the_best_figure_there_is():
    plain = image_groups([result("a", 2, 2, "10")])
    assert groups.choose_quality(plain) == RIGHT
    unchecked = result("a", 2, 2, "10") | {"right": None, "metrics": measured(KID=0.1) | measured(**{"FD (demo)": 2.0})}
    assert groups.choose_quality(image_groups([unchecked])) == Quality("FD (demo)", False)
    bare = result("a", 2, 2, "10") | {"right": None}
    assert groups.choose_quality(image_groups([bare])) == Quality("cumulative_entropy", False)
