"""Estimates of log-likelihoods, against brute force over all masks and the figures of the published code."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.masked_lm import tiny_model, word_tokenizer
from helpers.text import masked_lm_logits
from helpers.text_pipelines import MASK, make_block_pipe, make_pipe
from safetensors.torch import load_file

from diffusers_infogain import PRESETS, InfoGainScheduler
from diffusers_infogain.pipeline_infogain_text import InfoGainTextPipeline
from diffusers_infogain.text_likelihood import Answer, MaskDraws, draw_masks, encode_pair, estimate

GOLDEN = Path(__file__).parent / "golden"
PROMPT, ANSWER = [3, 1, 4], [5, 9, 2, 6]


@pytest.fixture(scope="module")
def pipe():
    pipe = make_pipe()
    weights = load_file(GOLDEN / "published_loops.safetensors")
    pipe.model.load_state_dict({key.removeprefix("full."): value for key, value in weights.items() if key.startswith("full.")})
    return pipe


@torch.no_grad()
def plain_log_p(pipe, ids: list[int], masked: tuple[int, ...], num_seen: int | None = None) -> dict[int, float]:
    """log p of the tokens of a sequence at the columns `masked`, from a forward of that sequence alone."""
    tokens, where = torch.tensor([ids[:num_seen]]), torch.zeros(1, len(ids[:num_seen]), dtype=torch.bool)
    where[0, list(masked)] = True
    logits = masked_lm_logits(pipe.model, pipe.family, tokens.masked_fill(where, MASK), None, where).float()
    logits[:, MASK] = -torch.inf
    rows = logits.log_softmax(-1)
    return {column: float(rows[row, ids[column]]) for row, column in enumerate(sorted(masked))}


def subsets(columns: range) -> list[tuple[int, ...]]:
    return [subset for size in range(1, len(columns) + 1) for subset in itertools.combinations(columns, size)]


def exact(pipe, ids: list[int], columns: range, num_seen: int | None = None) -> float:
    """Σ_k 1/L · L/k · (the mean over all sets of k masks of Σ log p)."""
    sums: dict[int, list[float]] = {}
    for subset in subsets(columns):
        sums.setdefault(len(subset), []).append(sum(plain_log_p(pipe, ids, subset, num_seen).values()))
    return sum(sum(values) / len(values) / size for size, values in sums.items())


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_expectation_is_that_over_all_orders_of_the_tokens(pipe):
    ids, columns = PROMPT + ANSWER, range(3, 7)
    orders = []
    for order in itertools.permutations(columns):
        orders.append(sum(plain_log_p(pipe, ids, order[place:])[order[place]] for place in range(len(order))))
    assert exact(pipe, ids, columns) == pytest.approx(sum(orders) / len(orders), abs=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_the_estimate_is_the_expectation_within_its_error_and_runs_equal_masks_once(pipe, group_size):
    output = pipe.log_likelihood(
        input_ids=[PROMPT], answer_ids=[ANSWER], num_draws=4096, group_size=group_size, generator=seeded(0)
    )
    expected = exact(pipe, PROMPT + ANSWER, range(3, 7))
    assert 0 < output.standard_error.item() < 0.2
    assert abs(output.log_likelihood.item() - expected) < 4 * output.standard_error.item()
    assert output.num_evaluations.tolist() == [15]


def test_dreams_expectation_is_that_over_its_times(pipe):
    output = pipe.log_likelihood(input_ids=[PROMPT], answer_ids=[ANSWER], likelihood="dream", num_draws=8192, generator=seeded(1))
    sums = {subset: sum(plain_log_p(pipe, PROMPT + ANSWER, subset).values()) for subset in subsets(range(3, 7))}
    times = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    p = 0.999 * times + 0.001
    expected = sum(float((p ** (len(s) - 1) * (1 - p) ** (4 - len(s))).mean()) * value for s, value in sums.items())
    assert abs(output.log_likelihood.item() - expected) < 4 * output.standard_error.item()
    assert output.num_evaluations.tolist() == [15]


@pytest.mark.parametrize("likelihood", ["left_to_right", "right_to_left"])
def test_an_order_of_the_tokens_is_followed_without_randomness(pipe, likelihood):
    output = pipe.log_likelihood(input_ids=[PROMPT], answer_ids=[ANSWER], likelihood=likelihood)
    expected = 0.0
    for column in range(3, 7):
        masked = tuple(range(column, 7)) if likelihood == "left_to_right" else tuple(range(3, column + 1))
        expected += plain_log_p(pipe, PROMPT + ANSWER, masked)[column]
    assert output.log_likelihood.item() == pytest.approx(expected, abs=1e-5)
    assert output.standard_error.item() == 0
    assert output.num_evaluations.tolist() == [4]


def test_figures_of_the_published_code(pipe):
    cases = json.loads((GOLDEN / "published_likelihoods.json").read_text())
    assert len(cases) == 6
    for case in cases:
        own = {name: case[name] for name in ("num_draws", "group_size")} | {"guidance_scale": 1 + case["cfg"]}
        output = pipe.log_likelihood(
            input_ids=[case["prompt"], case["prompt"]],
            answer_ids=[case["answer"], case["greedy_answer"]],
            generator=seeded(case["seed"], 0),
            check_greedy=True,
            **own,
        )
        assert output.log_likelihood[0].item() == pytest.approx(case["log_likelihood"], abs=1e-5)
        assert output.is_greedy.tolist() == [case["is_greedy"], case["greedy_answer_is_greedy"]]


def test_the_error_falls_with_the_root_of_the_number_of_draws_and_is_told():
    scores = torch.randn(2**5, 5, generator=seeded(9)[0]).abs().neg()
    deviations, told = {}, {}
    for num_draws in (16, 256):
        found = []
        for seed in range(300):
            draws = draw_masks(5, "llada", num_draws, 4, seeded(seed)[0])
            number = (draws.masked.long() * 2 ** torch.arange(5)).sum(-1)
            found.append(estimate(scores[number], draws))
        means, errors = torch.tensor(found, dtype=torch.float64).unbind(-1)
        deviations[num_draws], told[num_draws] = float(means.std()), float(errors.square().mean().sqrt())
    assert deviations[16] / deviations[256] == pytest.approx(4, rel=0.15)
    for num_draws in (16, 256):
        assert told[num_draws] == pytest.approx(deviations[num_draws], rel=0.15)


def test_counts_of_a_group_are_spread_evenly_over_the_lengths():
    draws = draw_masks(8, "llada", 4000, 4, seeded(3)[0])
    count = draws.masked.sum(-1)
    assert torch.equal(draws.weights, draws.masked * (8 / count.double())[:, None])
    assert (count.view(-1, 4).sort(-1).values.diff(dim=-1) == 2).all()
    assert (count.bincount(minlength=9)[1:] > 400).all()
    places = draws.masked.double().mean(0)
    assert ((places - count.double().mean() / 8).abs() < 0.04).all()


def test_one_token_takes_one_evaluation_and_has_no_error(pipe):
    output = pipe.log_likelihood(input_ids=[PROMPT], answer_ids=[[7]], num_draws=128)
    assert output.log_likelihood.item() == pytest.approx(plain_log_p(pipe, [*PROMPT, 7], (3,))[3], abs=1e-5)
    assert (output.standard_error.item(), output.num_evaluations.item()) == (0, 1)


def test_one_group_does_not_tell_its_error(pipe):
    output = pipe.log_likelihood(input_ids=[PROMPT], answer_ids=[ANSWER], num_draws=4)
    assert math.isnan(output.standard_error.item())


@pytest.mark.parametrize("make", [make_pipe, make_block_pipe, lambda: make_block_pipe(shifted=True)])
def test_an_estimate_is_the_same_alone_and_in_any_batch(make):
    pipe = make()
    prompts, answers = [[3, 1, 4], [7], [2, 6, 5, 3, 5]], [[5, 9, 2, 6, 1, 1], [4, 4], [8, 9, 7]]
    options = {"num_draws": 8, "group_size": 4, "check_greedy": True}
    together = pipe.log_likelihood(input_ids=prompts, answer_ids=answers, generator=seeded(1, 2, 3), batch_size=5, **options)
    for number in range(3):
        alone = pipe.log_likelihood(
            input_ids=[prompts[number]], answer_ids=[answers[number]], generator=seeded(number + 1), batch_size=1, **options
        )
        for name in ("log_likelihood", "standard_error", "num_evaluations", "is_greedy"):
            torch.testing.assert_close(alone[name][0], together[name][number], atol=1e-6, rtol=0)


def test_answers_of_block_causal_models_are_estimated_block_by_block():
    pipe = make_block_pipe()
    prompt, answer = [2, 6, 5, 3, 5], [8, 9, 7, 1, 2]  # columns 5 to 7, and 8 and 9
    output = pipe.log_likelihood(input_ids=[prompt], answer_ids=[answer], num_draws=2048, group_size=1, generator=seeded(4))
    expected = exact(pipe, prompt + answer, range(5, 8), 8) + exact(pipe, prompt + answer, range(8, 10))
    assert abs(output.log_likelihood.item() - expected) < 4 * output.standard_error.item()
    assert output.num_evaluations.tolist() == [7 + 3]


@pytest.mark.parametrize("make", [make_pipe, make_block_pipe, lambda: make_block_pipe(shifted=True)])
def test_what_is_decoded_greedily_is_greedy_and_nothing_else_is(make):
    pipe = make()
    pipe.scheduler = InfoGainScheduler(MASK, **{**PRESETS["llada"], "masking_schedule": "even"})
    prompts = [[3, 1, 4], [7], [2, 6, 5, 3, 5]]
    written = []
    for prompt, length in zip(prompts, (7, 1, 4), strict=True):
        output = pipe(input_ids=[prompt], max_new_tokens=length, stop_at_eos=False)
        written.append(output.sequences[0][output.attention_mask[0]].tolist()[len(prompt) :])
    others = [[*answer[:-1], (answer[-1] + 1) % 20] for answer in written]
    output = pipe.log_likelihood(input_ids=prompts * 2, answer_ids=written + others, num_draws=1, check_greedy=True)
    assert output.is_greedy.tolist() == [True] * 3 + [False] * 3


def test_pairs_are_split_behind_the_prompts_ids(pipe):
    assert encode_pair(pipe, "a red ", "cat on") == Answer(
        pipe.tokenizer("a red").input_ids, pipe.tokenizer("a red cat on").input_ids[len(pipe.tokenizer("a red").input_ids) :]
    )
    first = pipe.tokenizer("").input_ids or [pipe.tokenizer.bos_token_id]
    assert encode_pair(pipe, "", "dogs").prompt == first
    by_text = pipe.log_likelihood("a red ", "cat on", generator=seeded(0))
    pair = encode_pair(pipe, "a red", " cat on")
    by_ids = pipe.log_likelihood(input_ids=[pair.prompt], answer_ids=[pair.tokens], generator=seeded(0))
    assert by_text.log_likelihood.item() == by_ids.log_likelihood.item()


def test_the_end_of_an_encoders_text_stays_visible_behind_the_answer():
    pipe = InfoGainTextPipeline(tiny_model("bert"), word_tokenizer(), InfoGainScheduler(4, certainty="entropy"))
    pair = encode_pair(pipe, "w1 w2", " w3")
    assert (pair.prompt, pair.tokens, pair.end) == ([2, 6, 7], [8], (3,))
    assert math.isfinite(pipe.log_likelihood("w1 w2", " w3").log_likelihood.item())


def test_draws_that_mask_nothing_are_worth_nothing():
    draws = MaskDraws(torch.zeros(4, 3).bool(), torch.zeros(4, 3), 2)
    assert estimate(torch.full((4, 3), -torch.inf), draws) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"likelihood": "exact"}, r"`likelihood` must be one of llada, dream, left_to_right, right_to_left, got 'exact'"),
        ({"num_draws": 0}, r"`num_draws` must be an integer >= 1, got 0"),
        ({"num_draws": 12}, r"`num_draws` must be a multiple of `group_size` = 8, got 12"),
        ({"guidance_scale": 0.5}, r"`guidance_scale` must be a number in \[1, 1e\+06\], got 0.5"),
        ({"check_greedy": 1}, r"`check_greedy` must be True or False, got 1"),
        ({"answer_ids": None}, r"Either `prompt` and `answer` or `input_ids` and `answer_ids` must be given, got `input_ids`"),
        ({"prompt": "a"}, r"must be given, got `prompt`, `input_ids`, `answer_ids`"),
        ({"answer_ids": [[1], [2]]}, r"There must be one answer for each of the 1 prompts, got 2"),
        ({"answer_ids": [[1, MASK]]}, r"Prompts and answers must not have the model's mask token"),
        ({"answer_ids": [[1] * 70]}, r"A prompt and its answer have 73 tokens; the model takes 64"),
        ({"answer_ids": [[]]}, r"`answer_ids` must be a list of lists of token ids"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(pipe, change, message):
    with pytest.raises(ValueError, match=message):
        pipe.log_likelihood(**{"input_ids": [PROMPT], "answer_ids": [ANSWER], **change})
