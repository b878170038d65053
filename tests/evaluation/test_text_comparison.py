"""Records and tables of samplers on text tasks, with a writer whose answers are known."""

from __future__ import annotations

import pytest
import torch

from diffusers_infogain import choices
from diffusers_infogain.evaluation import text_comparison
from diffusers_infogain.evaluation.groups import RIGHT, best_greedy, difference
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.evaluation.statistics import clustered_mean, pearson
from diffusers_infogain.evaluation.tables import text_tables
from diffusers_infogain.trace import DecodingTrace


def fake_trace(rows: int, length: int, first: int) -> DecodingTrace:
    """Two steps: the first decodes the column `first` with 1 nat and 3 model evaluations, the second all others with 0.5 nats."""
    selected = torch.zeros(2, rows, length, dtype=torch.bool)
    selected[0, :, first] = True
    selected[1] = ~selected[0]
    return DecodingTrace(
        num_decoded=selected.sum(-1),
        cost=torch.tensor([[1.0], [0.5]]).expand(2, rows),
        gain=torch.zeros(2, rows),
        objective=torch.zeros(2, rows, 2),
        winner=torch.zeros(2, rows, dtype=torch.long),
        selected=selected,
        log_probability=torch.tensor([[-1.0], [-0.5]]).expand(2, rows),
        num_compared=torch.tensor([[2], [0]]).expand(2, rows),
        num_states=torch.tensor([[3], [1]]).expand(2, rows),
        num_evaluations=torch.tensor([[1], [1]]).expand(2, rows),
        num_passes=torch.tensor([[2], [1]]).expand(2, rows),
        entropies=torch.zeros(2, rows, length),
        tokens=torch.zeros(2, rows, length, dtype=torch.int32),
    )


def cell(task: str, seed: int = 0) -> text_comparison.TextCell:
    return text_comparison.TextCell(task, parse_sampler("confidence"), 2, seed)


@pytest.mark.parametrize(("first", "share"), [(1, 0.0), (8, 1.0)])
def test_answers_are_checked_and_the_first_decision_is_told(first, share):
    problems = text_comparison.problems_of("equation", 5)
    seen = []

    def answer(part, seeds):
        seen.extend(seeds)
        texts = ["03*05=0000001111"] * (len(part) - 1) + ["03*05=0000001110"]
        return texts, fake_trace(len(part), 1 + len(part[0].template), first)

    record = text_comparison.run(cell("equation", seed=2), problems, answer, batch_size=3)
    assert record["right"] == "11010"
    assert record["cumulative_entropies"] == [1.5] * 5
    assert record["num_states"] == record["num_evaluations"] == [4] * 5  # not what they share in batches
    assert record["steps"] == [2] * 5
    assert record["product_first"] == [share] * 5
    assert (record["distinct"], record["distinct_right"]) == (2, 1)
    assert seen == [2_000_000 + i for i in range(5)]


def test_the_first_decision_of_a_sample_that_was_begun_anew_is_that_of_its_last_try():
    problems = text_comparison.problems_of("equation", 3)
    traces = {False: fake_trace(3, 17, 1), True: fake_trace(3, 17, 8)}
    for given_up, trace in traces.items():
        if given_up:  # the first step of sample 1 decoded nothing that stayed, and its second one position 2
            trace.selected[0, 1] = False
            trace.selected[1, 1] = torch.arange(17) == 2
        record = text_comparison.run(cell("equation"), problems, lambda part, seeds, t=trace: (["03*05=0000001111"] * 3, t), 3)
        assert record["product_first"] == ([1.0, 0.0, 1.0] if given_up else [0.0] * 3)


def test_only_whole_equations_have_a_first_decision():
    for task in ("multiplication", "sudoku"):
        problems = text_comparison.problems_of(task, 2)
        answers = [problem.solution for problem in problems]
        record = text_comparison.run(cell(task), problems, lambda part, seeds, a=answers: (a, fake_trace(2, 17, 1)), 2)
        assert record["right"] == "11"
        assert record["product_first"] == [None, None]
    problems = text_comparison.problems_of("equation", 2)
    record = text_comparison.run(
        cell("equation"), problems, lambda part, seeds: (["", ""], fake_trace(2, 3, 1)), 2, infilled=False
    )
    assert (record["right"], record["product_first"]) == ("00", [None, None])


def test_problems_are_the_same_for_the_same_seed():
    for task in choices.TEXT_TASKS:
        assert text_comparison.problems_of(task, 4) == text_comparison.problems_of(task, 4)
        assert text_comparison.problems_of(task, 4) != text_comparison.problems_of(task, 4, seed=1)
    with pytest.raises(ValueError, match="`task` must be one of multiplication, equation, sudoku, countdown, got 'chess'"):
        text_comparison.problems_of("chess", 1)


@pytest.mark.parametrize("task", choices.TEXT_TASKS)
def test_splits_share_neither_problems_nor_noise(task):
    """Equations have nothing given and are all alike, so that only the noise tells them apart."""
    seen = {None: set()} | {split: set() for split in choices.SPLITS}
    for split, seeds in seen.items():
        problems = text_comparison.problems_of(task, 3, split=split)
        assert split is None or {problem.split for problem in problems} == {split}

        def answer(part, own, seeds=seeds):
            seeds.update(own)
            return [""] * len(part), fake_trace(len(part), 3, 1)

        for seed in (0, 999):
            text_comparison.run(cell(task, seed), problems, answer, 2, infilled=False, split=split)
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 24
    assert max(map(max, seen.values())) < 2**32  # PyTorch's generator on the CPU uses no more


def test_groups_are_means_over_problems_and_seeds():
    def record(seed: int, right: str) -> dict:
        return {
            "task": "sudoku",
            "sampler": "margin",
            "tokens_per_step": 2,
            "seed": seed,
            "looks_ahead": False,
            "right": right,
            "cumulative_entropies": [1.0, 3.0],
            "num_evaluations": [5, 7],
            "steps": [5, 5],
            "product_first": [None, None],
            "distinct": 2,
            "distinct_right": 1,
            "seconds": 1.0,
        }

    (group,) = text_comparison.text_groups([record(0, "10"), record(1, "11")])
    assert group.figures["right"].value == 0.75
    assert group.figures["cumulative_entropy"].value == 2
    assert group.figures["num_evaluations"].value == 6
    assert "product_first" not in group.figures
    table = text_tables([group])
    assert "**sudoku**" in table
    assert "| 2 | margin | 75 ± 25 |" in table


def test_lookahead_is_set_against_the_best_greedy_rule_at_the_same_pace():
    def record(sampler: str, right: str, entropy: float, per_step: int = 2, seed: int = 0) -> dict:
        n = len(right)
        rest = {"num_evaluations": [5] * n, "steps": [5] * n, "product_first": [None] * n, "distinct": n, "seconds": 1.0}
        own = {"sampler": sampler, "tokens_per_step": per_step, "seed": seed, "right": right, "distinct_right": right.count("1")}
        own["looks_ahead"] = parse_sampler(sampler).looks_ahead
        own["scheduler"] = parse_sampler(sampler).scheduler
        return {"task": "sudoku", **own, "cumulative_entropies": [entropy] * n, **rest}

    records = [
        record("margin", "1000", 4.0),
        record("entropy", "1100", 3.0),
        record("entropy", "1111", 1.0, per_step=1),
        record("entropy:num_runs=2", "1111", 2.0),
        record("info_gain", "0111", 2.5),
        record("paper", "1110", 2.0, seed=1),
    ]
    groups = text_comparison.text_groups(records)
    assert [group.greedy for group in groups] == [True, True, True, False, False, False]
    chosen = text_comparison.text_groups([record("margin", "1000", 4.0, seed=7), record("entropy", "1100", 3.0, seed=7)])
    assert best_greedy(groups[4], chosen, groups, RIGHT, same=["task", "tokens_per_step"]) is groups[1]
    gap = difference(groups[4], groups[1])
    assert gap.value == 0.25
    assert gap.standard_error == pytest.approx(clustered_mean([-1.0, 0.0, 1.0, 1.0], range(4)).standard_error)
    assert difference(groups[5], groups[1]) is None  # of other seeds
    assert "points above" not in text_tables(groups)
    table = text_tables(groups, chosen)
    assert "| +25.0 ± 47.9 (entropy) |" in table
    assert "| +50.0 ± 28.9 (entropy) |" in table
    assert "not measured here (entropy)" in table  # on the seed of paper
    two = [group for group in groups if group["tokens_per_step"] == 2]
    r = pearson([g.figures["cumulative_entropy"].value for g in two], [g.figures["right"].value for g in two]).r
    assert f"- 2 a step, 5 samplers: {r:.2f} with right, {r:.2f} with distinct and right" in table
    assert "- 1 a step" not in table
