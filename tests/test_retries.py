"""Unlikely samples are begun anew: what it costs, what it keeps, and what it goes by."""

import math

import pytest
import torch
from helpers.sampling import HashModel, generators, make_scheduler, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import decode, decode_beam, decode_best_of, load, scoring
from diffusers_infogain.candidates import split_generator

LENGTH, CODES = 12, 5
LIMITS = [("retry_below_nats", -1e6, 1e6), ("retry_above_nats", 1e6, 0.0), ("retry_below_sigmas", -1e6, 1e6)]
MASK = CODES


def canvas(batch: int, known: int = 0) -> torch.Tensor:
    tokens = torch.full((batch, LENGTH), MASK)
    tokens[:, :known] = 1
    return tokens


def assert_same(one, other) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert one.seeds == other.seeds
    for name, value in one.trace.tensors().items():
        assert torch.equal(value.nan_to_num(9e9), getattr(other.trace, name).nan_to_num(9e9)), name


@pytest.mark.parametrize(("setting", "never", "always"), LIMITS)
@pytest.mark.parametrize("config", [{"sampler": "pivot"}, {"sampler": "info_gain"}, {"sampler": "klass"}], ids=str)
def test_samples_that_pass_are_those_of_the_plain_loop_and_cost_the_same(config, setting, never, always):
    model = HashModel(LENGTH, CODES, conditions=(1, 2, 3))
    plain = decode(model, make_scheduler(MASK, 6, **config), canvas(3, 2), generator=generators(1, 2, 3))
    scheduler = make_scheduler(MASK, 6, **config, **{setting: never})
    assert_same(decode(model, scheduler, canvas(3, 2), generator=generators(1, 2, 3)), plain)
    one_try = make_scheduler(MASK, 6, **config, **{setting: always}, num_tries=1)
    assert_same(decode(model, one_try, canvas(3, 2), generator=generators(1, 2, 3)), plain)


@pytest.mark.parametrize("sampler", ["margin", "info_gain"])
def test_the_last_try_is_kept_and_the_canvas_is_evaluated_once(sampler):
    scheduler = make_scheduler(MASK, 6, sampler=sampler, num_tries=3, retry_below_nats=1e6)
    model = HashModel(LENGTH, CODES, conditions=(1, 2))
    output = decode(model, scheduler, canvas(2), generator=generators(4, 5))
    empty = tuple(canvas(1)[0].tolist())
    assert sum(state == empty for _, state in model.states) == 2
    assert output.trace.num_evaluations.sum() == len(model.states)
    for b, seed in enumerate((4, 5)):
        own = split_generator(torch.Generator().manual_seed(seed), 3)[2]
        alone = HashModel(LENGTH, CODES, conditions=(1 + b,))
        last = decode(alone, make_scheduler(MASK, 6, sampler=sampler), canvas(1), generator=[own])
        assert torch.equal(output.tokens[b], last.tokens[0])
        # The abandoned tries decode nothing and cost no nats.
        assert output.trace.cumulative_entropy[b].item() == pytest.approx(last.trace.cumulative_entropy[0].item())
        assert output.trace.num_decoded[:, b].sum() == LENGTH
        assert torch.equal(output.trace.selected[:, b].sum(0), torch.ones(LENGTH, dtype=torch.long))


@settings(max_examples=30, deadline=None)
@given(st.floats(-14, -6), st.floats(-2, 1), st.integers(1, 4), st.sampled_from(["pivot", "uniform", "info_gain", "halton"]))
def test_a_sample_is_the_same_alone_and_in_any_batch(nats, sigmas, tries, sampler):
    limits = {"retry_below_nats": nats, "retry_below_sigmas": sigmas, "num_tries": tries}
    scheduler = make_scheduler(MASK, 5, sampler=sampler, num_candidates=3, halton_randomize=True, **limits)
    model = HashModel(LENGTH, CODES, conditions=(1, 2, 3))
    together = decode(model, scheduler, canvas(3), generator=generators(7, 8, 9), grid=(3, 4), lookahead_batch_size=4)
    assert (together.tokens != MASK).all()
    for b in range(3):
        alone = HashModel(LENGTH, CODES, conditions=(1 + b,))
        output = decode(alone, scheduler, canvas(1), generator=generators(7 + b), grid=(3, 4))
        assert torch.equal(output.tokens[0], together.tokens[b])
        assert output.trace.num_evaluations.sum() == together.trace.num_evaluations[:, b].sum() == len(alone.states)
        assert together.trace.sequential_passes[b] >= output.trace.num_evaluations.gt(0).sum()


@pytest.mark.parametrize(("limit", "weight"), [({"retry_below_nats": -10.0}, 0), ({"retry_above_nats": 20.0}, 1)])
def test_samples_are_abandoned_when_they_pass_the_limit(limit, weight):
    """By brute force: the first of the tries, drawn by their own generators, for which S (less H~) never falls below."""
    (lowest_allowed,) = (-abs(value) for value in limit.values())
    scheduler, plain = (make_scheduler(MASK, 6, sampler="uniform", **extra) for extra in (limit, {}))
    abandoned = 0
    for seed in range(20):
        model = HashModel(LENGTH, CODES, conditions=(3,))
        output = decode(model, scheduler, canvas(1), generator=generators(seed))
        sources = [*generators(seed), *split_generator(torch.Generator().manual_seed(seed), 3)[1:]]
        for number, source in enumerate(sources):
            result = decode(model, plain, canvas(1), generator=[source])
            state, total, lowest = canvas(1), 0.0, 0.0
            for selected in result.trace.selected[:, 0]:
                log_p = model(state, torch.tensor([0]))[0].log_softmax(-1)
                total += log_p[selected, result.tokens[0, selected]].sum().item()
                total += weight * (log_p.exp() * log_p).sum(-1)[selected].sum().item()
                lowest = min(lowest, total)
                state = torch.where(selected, result.tokens, state)
            if lowest >= lowest_allowed or number == 2:
                break
            abandoned += 1
        assert torch.equal(output.tokens, result.tokens)
    assert 5 < abandoned < 40


def test_the_surplus_has_mean_zero_and_the_variance_that_is_reported():
    logits = random_logits(1, 6, CODES, seed=3).expand(6000, -1, -1)
    scheduler = make_scheduler(MASK, 1, sampler="uniform", retry_below_sigmas=-1.0)
    proposal = scheduler.propose(logits, 0, torch.full((6000, 6), MASK), generator=torch.Generator().manual_seed(0))
    surplus = (proposal.log_probability + proposal.cost)[:, 0].double()
    variance = proposal.variance[0, 0].item()
    assert abs(surplus.mean().item()) < 4 * math.sqrt(variance / 6000)
    assert surplus.var().item() == pytest.approx(variance, rel=0.1)
    log_p = logits[0].log_softmax(-1)
    exact = sum(
        (row.exp() * (row + entropy) ** 2).sum().item() for row, entropy in zip(log_p, scoring.entropy(logits[0]), strict=True)
    )
    assert variance == pytest.approx(exact, rel=1e-4)


def test_impossible_tokens_do_not_spoil_the_variance():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    assert scoring.surprisal_variance(logits).tolist() == pytest.approx([0.0], abs=1e-6)
    assert scoring.log_probability(logits, torch.tensor([[0, 2]])).tolist()[0] == pytest.approx([-math.log(2), -math.inf])


def test_best_of_n_retries_each_run_and_a_beam_search_or_a_callback_is_refused():
    scheduler = make_scheduler(MASK, 4, num_candidates=3, retry_below_nats=1e6, num_tries=2)
    model = HashModel(LENGTH, CODES, conditions=(1, 2))
    output = decode_best_of(model, scheduler, canvas(2), num_runs=2, generator=generators(1, 2))
    assert output.trace.num_evaluations.sum() == len(model.states)
    with pytest.raises(ValueError, match=r"The retries of the scheduler .* must be None for a beam"):
        decode_beam(model, scheduler, canvas(2), num_beams=2)
    with pytest.raises(ValueError, match="`callback` must be None with a scheduler that begins samples anew"):
        decode(model, scheduler, canvas(2), callback=lambda step: None)


def test_abandoned_samples_take_no_further_part_whatever_the_id_of_the_mask():
    """Ids shifted by one, with the mask first: the same decisions and the same evaluations."""
    hashed = HashModel(LENGTH, CODES, conditions=(1, 2))
    scheduler = make_scheduler(MASK, 6, sampler="margin", retry_below_nats=1e6)
    plain = decode(hashed, scheduler, canvas(2), generator=generators(4, 5))

    def shifted(states: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
        logits = hashed(torch.where(states == 0, MASK, states - 1), sample_index)
        return torch.cat([torch.zeros_like(logits[..., :1]), logits], -1)

    first = make_scheduler(0, 6, sampler="margin", retry_below_nats=1e6)
    output = decode(shifted, first, torch.zeros(2, LENGTH, dtype=torch.long), generator=generators(4, 5))
    assert torch.equal(output.tokens - 1, plain.tokens)
    assert torch.equal(output.trace.num_evaluations, plain.trace.num_evaluations)


def test_tries_that_are_not_needed_take_nothing():
    scheduler = make_scheduler(MASK, 6, sampler="margin", retry_below_nats=-1e6, num_tries=2**62)
    assert (decode(HashModel(LENGTH, CODES), scheduler, canvas(1)).tokens != MASK).all()


def test_an_interrupted_run_leaves_masks():
    asked = iter([False, False, True, True, True])
    scheduler = make_scheduler(MASK, 6, sampler="margin", retry_below_nats=1e6)
    output = decode(HashModel(LENGTH, CODES), scheduler, canvas(1), interrupted=lambda: next(asked))
    assert (output.tokens == MASK).all()


def test_pipelines_retry_and_refuse_a_callback():
    pipe = load("demo")
    pipe.set_progress_bar_config(disable=True)
    settings = {"sampler": "pivot", "entropy_bound": 0.25, "num_tries": 2}
    plain, likely = (
        type(pipe.scheduler).from_config(pipe.scheduler.config, **settings, retry_below_nats=limit) for limit in (None, 0.0)
    )
    results = {}
    for name, scheduler in (("plain", plain), ("likely", likely)):
        pipe.scheduler = scheduler
        results[name] = pipe("a red circle", generator=torch.Generator().manual_seed(1), output_type="latent")
    assert results["likely"].images.shape == results["plain"].images.shape
    assert results["likely"].seeds == results["plain"].seeds == [1]
    assert not torch.equal(results["likely"].images, results["plain"].images)
    with pytest.raises(ValueError, match="`callback_on_step_end` must be None with a scheduler that begins unlikely"):
        pipe("a red circle", callback_on_step_end=lambda pipe, step, timestep, kwargs: kwargs)
    with pytest.raises(ValueError, match="`num_beams` must be 1 with a scheduler that begins unlikely samples anew"):
        pipe("a red circle", num_beams=2)
