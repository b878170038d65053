"""Candidates that are looked at one after the other: which one is taken, what it costs, and what it leaves as it was."""

import math

import pytest
import torch
from helpers.sampling import HashModel, generators, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import Denoised, InfoGainScheduler, decode, decode_beam, load, scoring

LENGTH, CODES = 12, 5
MASK = CODES


def canvas(batch: int, known: int = 0) -> torch.Tensor:
    tokens = torch.full((batch, LENGTH), MASK)
    tokens[:, :known] = 1
    return tokens


def entropies(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.where(tokens == MASK, scoring.entropy(logits.masked_fill(torch.arange(CODES) == MASK, -torch.inf)), 0.0)


def decode_lazily(model, scheduler, tokens, generator, threshold):
    """One sample, by the definition: (tokens, states that the model saw)."""
    logits, memory, seen = model(tokens, torch.tensor([0])), None, 1
    for timestep in scheduler.timesteps:
        if not (tokens == MASK).any():
            break
        proposal = scheduler.propose(logits, timestep, tokens, generator=[generator], memory=memory)
        memory, tried = proposal.memory, {}
        if not proposal.needs_lookahead:  # all candidates are one state, or decode the rest
            tokens = proposal.candidates[:, 0]
            logits, seen = model(tokens, torch.tensor([0])), seen + int((tokens == MASK).any())
            continue
        for state in proposal.candidates[0]:
            key = tuple(state.tolist())
            if key not in tried:
                after = model(state[None], torch.tensor([0]))
                still = state[None] == MASK
                # Σ over what is still masked of H before - H after
                fall = torch.where(still, entropies(logits, tokens) - entropies(after, state[None]), 0.0).sum().item()
                tried[key] = (fall, after)
                seen += int(still.any())
                if not still.any() or fall >= threshold:
                    break
        accepted = [key for key, (fall, _) in tried.items() if fall >= threshold or MASK not in key]
        best = accepted[0] if accepted else max(tried, key=lambda key: tried[key][0])
        tokens, logits = torch.tensor([best]), tried[best][1]
    return tokens, seen


@pytest.mark.parametrize("certainty", ["maskgit", "pivot", "uniform"])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 1e6])
@pytest.mark.parametrize("bound", [0, 5.0])
def test_the_first_candidate_that_is_good_enough_is_taken(certainty, threshold, bound):
    config = {"sampler": "info_gain", "certainty": certainty, "num_candidates": 4, "lazy_threshold": threshold}
    config["entropy_bound"] = bound
    for seed in range(12):
        model = HashModel(LENGTH, CODES, seed=seed, scale=1.5)
        scheduler = make_scheduler(MASK, 5, **config)
        expected, states = decode_lazily(model, scheduler, canvas(1), torch.Generator().manual_seed(seed), threshold)
        output = decode(model, scheduler, canvas(1), generator=generators(seed))
        assert torch.equal(output.tokens, expected)
        assert output.trace.num_states.sum() == states


def test_candidates_behind_the_one_that_is_taken_are_not_run_and_have_no_score():
    model = HashModel(LENGTH, CODES)
    always = make_scheduler(MASK, 5, sampler="info_gain", lazy_threshold=-1e6)
    trace = decode(model, always, canvas(1), generator=generators(0)).trace
    assert len(model.states) == trace.num_states.sum() == trace.sequential_passes.item() == 5  # as many as steps: none is wasted
    assert (trace.winner == 0).all()
    looked = trace.num_compared[:, 0] > 0
    assert trace.objective[looked, 0, 0].isfinite().all()
    assert trace.objective[looked, 0, 1:].isnan().all()
    never = make_scheduler(MASK, 5, sampler="info_gain", lazy_threshold=1e6)
    trace = decode(HashModel(LENGTH, CODES), never, canvas(1), generator=generators(0)).trace
    assert torch.equal(trace.num_passes, trace.num_states)  # one after the other
    assert trace.num_states[0, 0] > 2


@settings(max_examples=30, deadline=None)
@given(st.floats(-2, 2), st.integers(2, 4), st.sampled_from(["pivot", "uniform", "maskgit"]), st.sampled_from(["sum", "mean"]))
def test_a_sample_is_the_same_alone_and_in_any_batch(threshold, candidates, certainty, reduction):
    config = {"num_candidates": candidates, "certainty": certainty, "gain_reduction": reduction, "entropy_bound": 0.5}
    scheduler = make_scheduler(MASK, 5, sampler="info_gain", lazy_threshold=threshold, retry_below_nats=-20.0, **config)
    model = HashModel(LENGTH, CODES, conditions=(1, 2, 3))
    together = decode(model, scheduler, canvas(3), generator=generators(7, 8, 9), lookahead_batch_size=2)
    assert together.trace.num_states.sum() == len(model.states)
    for b in range(3):
        alone = HashModel(LENGTH, CODES, conditions=(1 + b,))
        output = decode(alone, scheduler, canvas(1), generator=generators(7 + b))
        assert torch.equal(output.tokens[0], together.tokens[b])
        assert output.trace.num_states.sum() == together.trace.num_states[:, b].sum() == len(alone.states)
        assert output.trace.sequential_passes.item() == together.trace.sequential_passes[b] == len(alone.calls)


def test_beams_compare_all_candidates():
    outputs = [
        decode_beam(HashModel(LENGTH, CODES), make_scheduler(MASK, 5, **extra), canvas(1), num_beams=2, generator=generators(1))
        for extra in ({}, {"lazy_threshold": 0.0})
    ]
    assert torch.equal(outputs[0].tokens, outputs[1].tokens)
    assert torch.equal(outputs[0].trace.num_states, outputs[1].trace.num_states)


@pytest.mark.parametrize("sampler", ["margin", "lookum"])
def test_greedy_samplers_and_lookum_do_not_read_the_threshold(sampler):
    plain, lazy = (
        decode(HashModel(LENGTH, CODES), make_scheduler(MASK, 5, sampler=sampler, **extra), canvas(1), generator=generators(1))
        for extra in ({}, {"lazy_threshold": 0.0})
    )
    assert torch.equal(plain.tokens, lazy.tokens)
    assert torch.equal(plain.trace.num_states, lazy.trace.num_states)


def test_a_gain_that_is_never_negative_is_refused():
    with pytest.raises(
        ValueError, match=r"`lazy_threshold` must be None with the `gain_reduction` 'kl', .* got 0\.0: use 'sum'\."
    ):
        InfoGainScheduler(mask_token_id=MASK, lazy_threshold=0.0, gain_reduction="kl")
    with pytest.raises(ValueError, match=r"`lazy_threshold` must be a number.*got nan"):
        InfoGainScheduler(mask_token_id=MASK, lazy_threshold=math.nan, gain_reduction="sum")


def test_the_network_is_counted_as_the_model_says():
    model = HashModel(LENGTH, CODES, conditions=(1, 2))
    scheduler = make_scheduler(MASK, 5, lazy_threshold=0.0)

    def rows(tokens, sample_index):
        return torch.where((tokens == MASK).sum(-1) > LENGTH // 2, 2, 1) + 10 * sample_index

    def denoise(tokens, sample_index):
        return Denoised(model(tokens, sample_index), rows(tokens, sample_index))

    trace = decode(denoise, scheduler, canvas(2), generator=generators(1, 2)).trace
    for b in range(2):
        seen = [state for sample, state in model.states if sample == b]
        expected = [(2 if state.count(MASK) > LENGTH // 2 else 1) + 10 * b for state in seen]
        assert trace.num_evaluations[:, b].sum() == sum(expected)
        assert trace.num_states[:, b].sum() == len(seen)


def test_the_demo_model_looks_ahead_at_nearly_the_cost_of_its_greedy_rule():
    pipe = load("demo")
    config = {**pipe.scheduler.config, "certainty": "pivot", "entropy_bound": 0.25, "gain_reduction": "sum"}
    pipe.scheduler = InfoGainScheduler.from_config(config, lazy_threshold=-100.0)
    prompt = ["a red circle", "two blue squares"]
    trace = pipe(prompt, num_inference_steps=64, generator=generators(1, 2), output_type="pil").trace
    steps = (trace.num_decoded > 0).sum(0)
    assert torch.equal(trace.num_states.sum(0), steps)
