from __future__ import annotations

import numpy as np
import pytest
from helpers.comparison import measured, result

from diffusers_infogain.evaluation import groups
from diffusers_infogain.evaluation.groups import RIGHT, Quality
from diffusers_infogain.evaluation.image_comparison import image_groups
from diffusers_infogain.settings import SETTINGS


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


def chosen_and_measured():
    """The same settings on prompts for choosing, where "entropy" is best, and on others, where "margin" is."""
    chosen = [
        result("margin", 4, 4, "1000"),
        result("entropy", 4, 4, "1110"),
        result("confidence", 16, 16, "1111"),
        result("pivot", 64, 5, "1111", sequential_passes=5),
        result("entropy:num_runs=8", 4, 32, "1111"),
        result("pivot:retry_below_nats=-7", 4, 4, "1111"),
        result("info_gain", 4, 4, "1111", num_candidates=5),
    ]
    measured = [
        result("margin", 4, 4, "1111"),
        result("entropy", 4, 4.05, "0000"),
        result("info_gain", 4, 4.4, "1110", num_candidates=5),
        result("info_gain", 2, 2, "1110", num_candidates=5),
    ]
    return image_groups(chosen), image_groups(measured)


def test_a_rival_is_chosen_by_figures_on_other_prompts_only():
    chosen, measured = chosen_and_measured()
    ours = measured[2]
    rival = groups.best_greedy(ours, chosen, measured, RIGHT, limit="num_evaluations")
    assert rival is measured[1]  # "margin" is better here, but that is not known beforehand
    better = image_groups([result("entropy", 4, 4.05, "1111"), *(group.records[0] for group in measured if group is not rival)])
    assert groups.best_greedy(better[1], chosen, better, RIGHT, limit="num_evaluations").label == "entropy"
    assert groups.best_greedy(measured[3], chosen, measured, RIGHT, limit="num_evaluations") is None


def test_a_rival_is_any_greedy_rule_that_costs_no_more():
    chosen, measured = chosen_and_measured()
    ours = measured[2]
    # neither the lookahead, nor the search, nor the retries; a rule that was not measured here has the cost that it had there
    assert groups.best_greedy(ours, chosen, measured, RIGHT).label == "confidence"
    dear = image_groups([result("info_gain", 8, 4.95, "1110", num_candidates=5)])[0]
    assert groups.best_greedy(dear, chosen, measured, RIGHT, limit="num_evaluations") is chosen[3]
    assert groups.best_greedy(dear, chosen, measured, RIGHT, limit="num_evaluations", same=["steps"]) is None
    costly = image_groups([result("pivot", 64, 6, "1111", sequential_passes=6)])
    assert groups.best_greedy(dear, chosen, [*measured, *costly], RIGHT, limit="num_evaluations") is measured[1]
    with pytest.raises(ValueError, match=r"`limit` must be among the figures right, .*sequential_passes, .*, got 'time'"):
        groups.best_greedy(ours, chosen, measured, RIGHT, limit="time")


def test_possible_rivals_are_those_that_are_the_best_at_some_cost():
    chosen = image_groups(
        [
            result("margin", 4, 4, "1000", sequential_passes=8),
            result("entropy", 5, 5, "1000", sequential_passes=2),
            result("pivot", 6, 6, "1000", sequential_passes=8),
            result("confidence", 8, 8, "1100"),
            result("info_gain", 1, 1, "1111", num_candidates=5),
        ]
    )

    def names(*limits):
        return [group.label for group in groups.possible_rivals(chosen, RIGHT, limits)]

    assert names("num_evaluations") == ["margin", "confidence"]
    assert names("num_evaluations", "sequential_passes") == ["margin", "entropy", "confidence"]
    assert names() == []


@pytest.mark.parametrize(
    ("sampler", "greedy"),
    [
        ("pivot:entropy_bound=0.25,top_p=0.9", True),
        ("pivot:guidance_scale=1", True),
        ("pivot:guidance_interval=0.2:1", False),
        ("pivot:num_beams=2", False),
        ("pivot:corrector=verify", False),
        *((f"pivot:{name}=-7", False) for name in SETTINGS if name.startswith("retry_")),
    ],
)
def test_greedy_rules_neither_look_back_nor_search_nor_change_their_guidance(sampler, greedy):
    (group,) = image_groups([result(sampler, 4, 4, "11")])
    assert group.greedy == greedy
    assert (group in groups.greedy_rules([group], RIGHT)) == greedy


def test_rules_with_fewer_images_than_others_are_no_rivals():
    runs = [result("margin", 4, 4, "1111"), result("entropy", 4, 4, "1100"), result("entropy", 4, 4, "1110", seed=1)]
    chosen = image_groups(runs)
    ours = image_groups([result("info_gain", 4, 4, "1111", num_candidates=5)])[0]
    assert groups.best_greedy(ours, chosen, [ours], RIGHT).label == "entropy"


def test_the_pareto_front_holds_what_no_other_group_dominates():
    runs = [result(name, rows, rows, right) for name, rows, right in (("maskgit", 2, "1000"), ("pivot", 4, "1000"))]
    runs += [result("margin", 8, 8, "1100"), result("uniform", 8, 8, "1110")]
    found = image_groups(runs)
    assert [group["sampler"] for group in groups.pareto_front(found, RIGHT)] == ["maskgit", "uniform"]
    fast = image_groups([result("entropy", 9, 9, "1100", sequential_passes=1)])
    found += fast
    assert [group["sampler"] for group in groups.pareto_front(found, RIGHT)] == ["maskgit", "uniform"]
    both = groups.pareto_front(found, RIGHT, ["num_evaluations", "sequential_passes"])
    assert [group["sampler"] for group in both] == ["maskgit", "uniform", "entropy"]


def brute_force_front(points):
    return [p for p in points if not any(all(a >= b for a, b in zip(q, p, strict=True)) and q != p for q in points)]


def test_the_pareto_front_equals_brute_force():
    generator = np.random.default_rng(0)
    points = [tuple(int(value) for value in generator.integers(1, 5, 3)) for _ in range(40)]
    runs = [
        result("maskgit", n, nfe, "1" * right + "0" * (4 - right), sequential_passes=passes)
        for n, (right, nfe, passes) in enumerate(points, 1)
    ]
    found = groups.pareto_front(image_groups(runs), RIGHT, ["num_evaluations", "sequential_passes"])
    expected = {(right, -nfe, -passes) for right, nfe, passes in points}
    seen = [(4 * group.value("right"), -group.value("num_evaluations"), -group.value("sequential_passes")) for group in found]
    assert sorted(set(seen)) == sorted(brute_force_front(expected))
    assert [nfe for _, nfe, _ in seen] == sorted((nfe for _, nfe, _ in seen), reverse=True)


def test_samplers_are_ranked_by_the_best_figure_there_is():
    plain = image_groups([result("a", 2, 2, "10")])
    assert groups.choose_quality(plain) == RIGHT
    unchecked = result("a", 2, 2, "10") | {"right": None, "metrics": measured(KID=0.1) | measured(**{"FD (demo)": 2.0})}
    assert groups.choose_quality(image_groups([unchecked])) == Quality("FD (demo)", False)
    for names in (["CMMD", "FD-DINOv2"], ["KID", "FID∞"], ["CLIP score", "CMMD, unbiased", "CMMD"], ["kernel distance (demo)"]):
        metrics = measured(**dict.fromkeys(names, 1.0))
        some = result("a", 2, 2, "10") | {"right": None, "metrics": metrics}
        assert groups.choose_quality(image_groups([some])) == Quality(names[-1], False)
    bare = result("a", 2, 2, "10") | {"right": None}
    assert groups.choose_quality(image_groups([bare])) == Quality("cumulative_entropy", False)
