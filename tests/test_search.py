"""Beam search and best-of-N of the decoding module."""

import pytest
import torch
from helpers.reference import plain_evaluation, plain_uncertainty
from helpers.sampling import HashModel, generators, make_scheduler, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import decode, decode_beam, decode_best_of
from diffusers_infogain.candidates import split_generator
from diffusers_infogain.rules import RULES
from diffusers_infogain.settings import RUN_SCORES


def canvas(batch: int, length: int, codes: int, known: int = 0) -> torch.Tensor:
    tokens = torch.full((batch, length), codes)
    tokens[:, :known] = torch.arange(known) % codes
    return tokens


def plain_beam(model, scheduler, tokens, allowed, sample, seed, num_beams):
    """The reference for one sample (L,): its tokens and g, the cost of its path."""
    mask, weight, reduction = (scheduler.config[name] for name in ("mask_token_id", "gain_weight", "gain_reduction"))
    (generator,), rows = generators(seed), torch.tensor([sample])

    def masked(state):
        return (state == mask) & allowed

    beams, masks = [(0.0, 0.0, tokens)], masked(tokens).sum()[None]
    for timestep in scheduler.timesteps:
        children = []
        for _, g, state in beams:
            logits = model(state[None], rows)
            proposal = scheduler.propose(
                logits, timestep, state[None], allowed[None], generator=[generator], initial_masks=masks, grid=(1, len(state))
            )
            for child in proposal.candidates[0]:
                after = model(child[None], rows)[0]
                cost, _ = plain_evaluation(logits[0], masked(state), None, masked(child), reduction)
                f = g + cost + weight * plain_uncertainty(after, masked(child), reduction)
                children.append((f, g + cost, child))
        children.sort(key=lambda child: child[0])
        states = [tuple(child[2].tolist()) for child in children]
        beams = [child for i, child in enumerate(children) if states[i] not in states[:i]][:num_beams]
    _, g, state = min(beams, key=lambda beam: beam[1])
    return state, g


@pytest.mark.parametrize("reduction", ["mean", "sum", "kl"])
@pytest.mark.parametrize("certainty", RULES)
@pytest.mark.parametrize(
    "config", [{}, {"entropy_bound": 1.5}, {"tokens_per_step": 2, "gain_weight": 0.5, "confidence_threshold": 0.4}]
)
def test_one_beam_is_the_plain_loop_draw_for_draw(reduction, certainty, config):
    scheduler = make_scheduler(5, 6, certainty=certainty, gain_reduction=reduction, num_candidates=4, **config)
    tokens = canvas(3, 12, 5)
    tokens[1, :5], tokens[2, 2:] = 1, 3
    for seed in range(3):
        runs = []
        for search in ({}, {"num_beams": 1}):
            # for klass a model whose predictions change little, so that some positions settle and others do not
            model = HashModel(12, 5, (4, 5, 6), seed=seed, scale=0.025 if certainty == "klass" else 2)
            method = decode_beam if search else decode
            runs.append(method(model, scheduler, tokens, generator=generators(seed, 10, 11), grid=(3, 4), **search))
        plain, beam = runs
        assert torch.equal(plain.tokens, beam.tokens)
        for name in ("cost", "selected", "num_decoded", "winner", "num_evaluations"):
            assert torch.equal(getattr(plain.trace, name), getattr(beam.trace, name)), name
        torch.testing.assert_close(plain.trace.gain, beam.trace.gain, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 6),
    st.integers(2, 4),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, 0.6]),
)
def test_beam_search_equals_a_plain_reference(seed, num_beams, num_candidates, reduction, weight, per_step, threshold):
    config = {"gain_reduction": reduction, "gain_weight": weight, "tokens_per_step": per_step, "confidence_threshold": threshold}
    scheduler = make_scheduler(2, 4, 0.5, certainty="confidence", num_candidates=num_candidates, **config)
    tokens = canvas(2, 7, 2, known=1)
    tokens[1, 4] = 0
    allowed = torch.ones(2, 7).bool()
    allowed[1, 5] = False
    model = HashModel(7, 2, (seed, seed + 1), seed=seed)
    options = {"num_beams": num_beams, "allowed": allowed, "lookahead_batch_size": 3}
    output = decode_beam(model, scheduler, tokens, generator=generators(seed, seed + 5), **options)
    rows = [model.rows_of(sample) for sample in range(2)]
    assert output.trace.num_evaluations.sum(0).tolist() == rows
    assert max(model.calls) <= 3
    for b, own in enumerate((seed, seed + 5)):
        state, g = plain_beam(model, scheduler, tokens[b], allowed[b], b, own, num_beams)
        assert torch.equal(output.tokens[b], state)
        assert output.trace.cumulative_entropy[b].item() == pytest.approx(g, abs=1e-4)
        decoded = (tokens[b] != output.tokens[b]).long()
        assert torch.equal(output.trace.selected[:, b].sum(0), decoded)
        assert torch.equal(output.trace.num_decoded[:, b], output.trace.selected[:, b].sum(-1))


def test_a_sample_of_a_beam_search_is_the_same_alone_and_in_a_batch():
    scheduler, tokens = make_scheduler(5, 5, num_candidates=3), canvas(3, 10, 5)
    tokens[1, 3:] = 2
    together = decode_beam(HashModel(10, 5, (1, 2, 3)), scheduler, tokens, num_beams=3, generator=generators(4, 5, 6))
    for b in range(3):
        model = HashModel(10, 5, (b + 1,))
        alone = decode_beam(model, scheduler, tokens[b : b + 1], num_beams=3, generator=generators(4 + b))
        assert torch.equal(alone.tokens[0], together.tokens[b])
    assert (together.tokens != 5).all()
    assert torch.equal(together.tokens[1, 3:], tokens[1, 3:])


def test_more_beams_find_cheaper_paths_on_average():
    scheduler, tokens = make_scheduler(4, 8, num_candidates=4, certainty="uniform"), canvas(40, 8, 4)
    model = HashModel(8, 4, [0] * 40)
    costs = []
    for num_beams in (1, 8):
        output = decode_beam(model, scheduler, tokens, num_beams=num_beams, generator=torch.Generator().manual_seed(1))
        costs.append(output.trace.cumulative_entropy.mean())
    assert costs[1] < costs[0]


def test_beam_search_of_nothing_masked_runs_no_model():
    model = HashModel(6, 5)
    tokens = torch.zeros(1, 6, dtype=torch.long)
    output = decode_beam(model, make_scheduler(5, 3), tokens, num_beams=2)
    assert torch.equal(output.tokens, tokens)
    assert model.calls == []


@pytest.mark.parametrize(
    ("config", "num_beams", "message"),
    [
        ({"sampler": "lookum"}, 2, "`scheduler` must use the sampler 'info_gain'.*'lookum' with 8"),
        ({"sampler": "confidence"}, 2, "`scheduler` must use the sampler 'info_gain'.*'confidence'"),
        ({"num_candidates": 1}, 2, "at least 2 candidates for a beam search, got 'info_gain' with 1"),
        ({}, 0, "`num_beams` must be an integer >= 1, got 0"),
        ({}, 1.5, "`num_beams` must be an integer >= 1, got 1.5"),
    ],
)
def test_invalid_beam_search_is_an_error(config, num_beams, message):
    with pytest.raises(ValueError, match=message):
        decode_beam(HashModel(6, 5), make_scheduler(5, 3, **config), canvas(1, 6, 5), num_beams=num_beams)


@pytest.mark.parametrize("sampler", ["info_gain", "lookum", "maskgit", "uniform", "confidence"])
@pytest.mark.parametrize(("num_runs", "best_run_by"), [(1, "log_likelihood"), *((4, score) for score in RUN_SCORES)])
def test_best_of_returns_the_run_with_the_smallest_entropy_or_the_largest_likelihood(sampler, num_runs, best_run_by):
    scheduler = make_scheduler(5, 4, sampler=sampler, num_candidates=3, best_run_by=best_run_by)
    tokens, conditions = canvas(3, 9, 5), (7, 8, 9)
    tokens[1, :4] = 0
    allowed = torch.ones(3, 9).bool()
    allowed[2, -3:] = False
    model = HashModel(9, 5, conditions)
    options = {"allowed": allowed, "num_runs": num_runs, "lookahead_batch_size": 5}
    best = decode_best_of(model, scheduler, tokens, generator=generators(1, 2, 3), **options)
    for b, own in enumerate(generators(1, 2, 3)):
        single = HashModel(9, 5, conditions[b : b + 1])
        runs = [
            decode(single, scheduler, tokens[b : b + 1], allowed=allowed[b : b + 1], generator=[child])
            for child in split_generator(own, num_runs)
        ]
        of_entropy, of_likelihood = {
            **{"cumulative_entropy": (1, 0), "log_likelihood": (0, 1)},
            **{"entropy_and_likelihood": (1, 1)},
        }[best_run_by]
        losses = [
            of_entropy * run.trace.cumulative_entropy.item() - of_likelihood * run.trace.log_likelihood.item() for run in runs
        ]
        winner = runs[losses.index(min(losses))]
        assert torch.equal(best.tokens[b], winner.tokens[0])
        assert torch.equal(best.trace.selected[:, b], winner.trace.selected[:, 0])
        assert best.trace.log_likelihood[b].item() == pytest.approx(winner.trace.log_likelihood.item(), rel=1e-6)
        rows = best.trace.num_evaluations[:, b].sum()
        assert rows == single.rows_of(0) == model.rows_of(b) == sum(run.trace.num_evaluations.sum() for run in runs)
        assert num_runs == 1 or len(set(losses)) > 1


@pytest.mark.parametrize("num_runs", [0, 2.0])
def test_invalid_number_of_runs_is_an_error(num_runs):
    with pytest.raises(ValueError, match=f"`num_runs` must be an integer >= 1, got {num_runs}"):
        decode_best_of(HashModel(6, 5), make_scheduler(5, 3), canvas(1, 6, 5), num_runs=num_runs)


def test_the_calls_of_best_of_n_are_those_of_one_run():
    for sampler, calls in (("margin", 4), ("info_gain", 4)):  # four steps, the last of them without a lookahead
        scheduler, model = make_scheduler(5, 4, sampler=sampler, num_candidates=3), HashModel(12, 5, (1,))
        trace = decode_best_of(model, scheduler, canvas(1, 12, 5), num_runs=3, generator=generators(2)).trace
        assert trace.sequential_passes.tolist() == [len(model.calls)] == [calls]


def test_best_of_takes_the_first_of_runs_that_differ_by_rounding():
    logits = random_logits(1, 6, 5, seed=4).expand(3, 6, 5) * torch.tensor([1.0, 1 + 1e-6, 1 + 2e-6])[:, None, None]

    def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return logits[: len(tokens)] if len(tokens) == 3 else logits[:1]

    scheduler = make_scheduler(5, 1, sampler="confidence")
    output = decode_best_of(denoise, scheduler, torch.full((1, 6), 5), num_runs=3, generator=generators(0))
    (parent,) = generators(0)
    first = decode(denoise, scheduler, torch.full((1, 6), 5), generator=[split_generator(parent, 3)[0]])
    assert torch.equal(output.tokens, first.tokens)
    assert logits[1:].log_softmax(-1).exp().mul(logits[1:].log_softmax(-1)).sum((-1, -2)).neg().max() < output.trace.cost.max()
