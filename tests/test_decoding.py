"""The loop, on models whose logits depend on every token of the state; beam search and best-of-N are in test_search.py."""

import functools
import itertools
import math
import weakref
from collections import Counter

import pytest
import torch
from helpers.reference import plain_entropy
from helpers.sampling import HashModel, assert_the_same_alone, generators, make_scheduler, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import decode, decode_beam
from diffusers_infogain.rules import RULES, SAMPLERS

CODES, MASK = 6, 6
GREEDY = tuple(name for name, sampler in SAMPLERS.items() if not sampler.looks_ahead and sampler.paced)
"""That decode something in every step."""


def canvas(batch: int, length: int, share: float, seed: int = 0) -> torch.Tensor:
    """Tokens of which about `share` are masked, in another number in each sample."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(CODES, (batch, length), generator=generator)
    return torch.where(torch.rand(batch, length, generator=generator) < share, MASK, known)


@st.composite
def cases(draw, samplers=tuple(SAMPLERS)):
    length = draw(st.integers(1, 14))
    tokens = canvas(draw(st.integers(1, 3)), length, draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])), draw(st.integers(0, 99)))
    config = {
        "sampler": draw(st.sampled_from(samplers)),
        "certainty": draw(st.sampled_from(list(RULES))),
        "num_candidates": draw(st.integers(1, 5)),
        "masking_schedule": draw(st.sampled_from(["cosine", "linear", "arccos"])),
        "tokens_per_step": draw(st.none() | st.integers(1, 4)),
        "gain_reduction": "mean",
    }
    if SAMPLERS[config["sampler"]].ready is None:
        config["confidence_threshold"] = draw(st.sampled_from([None, 0.5, 0.9]))
    else:
        config["parallel_threshold"] = draw(st.sampled_from([0.5, 0.9]))
    config["entropy_bound"] = draw(st.sampled_from([None, 0.5, 4.0, *([0] if config["sampler"] != "entropy_bound" else [])]))
    config["gain_reduction"] = draw(st.sampled_from(["mean", "sum", "kl"] if config["sampler"] != "lookum" else ["mean", "sum"]))
    scheduler = make_scheduler(MASK, draw(st.integers(1, 20)), draw(st.sampled_from([None, 0.0, 0.4])), **config)
    seeds = draw(st.lists(st.integers(0, 10**6), min_size=len(tokens), max_size=len(tokens)))
    return scheduler, tokens, seeds


def run(scheduler, tokens, seeds, model=None, **options):
    model = model or HashModel(tokens.shape[1], CODES, conditions=seeds)
    return decode(model, scheduler, tokens, generator=generators(*seeds), grid=(1, tokens.shape[1]), **options)


def commits(model: HashModel, tokens: torch.Tensor, output, sample: int):
    """(state, logits, committed positions) of each step of a sample that changed it."""
    state = tokens[sample]
    for positions in output.trace.selected[:, sample]:
        if positions.any():
            yield state, model(state[None], torch.tensor([sample]))[0], positions
        state = torch.where(positions, output.tokens[sample], state)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_no_mask_is_left_and_the_trace_adds_up(case):
    scheduler, tokens, seeds = case
    before = tokens.clone()
    output, masked = run(scheduler, tokens, seeds), tokens == MASK
    trace, (batch, length) = output.trace, tokens.shape
    assert torch.equal(tokens, before)
    assert ((output.tokens >= 0) & (output.tokens < CODES)).all()
    assert torch.equal(output.tokens[~masked], tokens[~masked])
    steps = len(trace.cost)
    assert steps <= len(scheduler.timesteps)
    num = scheduler.config.num_candidates if scheduler.looks_ahead else 1
    shapes = {name: tuple(value.shape) for name, value in trace.tensors().items()}
    assert shapes.pop("objective") == (steps, batch, num)
    for name in ("selected", "entropies", "tokens"):
        assert shapes.pop(name) == (steps, batch, length)
    assert set(shapes.values()) == {(steps, batch)}
    assert torch.equal(trace.num_decoded.sum(0), masked.sum(-1))
    assert torch.equal(trace.selected.sum(-1), trace.num_decoded)
    assert torch.equal(trace.selected.sum(0), masked.long())
    assert torch.equal(trace.decoded_at >= 0, masked)
    for index in range(steps):
        assert torch.equal(trace.decoded_at == index, trace.selected[index])
    assert not trace.cost.isnan().any()


@settings(max_examples=40, deadline=None)
@given(cases(), st.none() | st.integers(1, 7))
def test_a_sample_is_the_same_alone_and_in_any_batch_for_any_chunk(case, chunk):
    assert_the_same_alone(run, *case, chunk)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_calls_in_sequence_are_the_calls_of_the_model_for_a_sample_alone(case):
    scheduler, tokens, seeds = case
    for b, seed in enumerate(seeds):
        model = HashModel(tokens.shape[1], CODES, conditions=[seed])
        output = run(scheduler, tokens[b : b + 1], [seed], model)
        (calls,), trace = output.trace.sequential_passes.tolist(), output.trace
        # Steps that should look ahead but whose candidates coincide leave their logits to be computed in the next one.
        coincided = int(trace.objective.isnan().any(-1).sum()) if scheduler.looks_ahead else 0
        assert calls <= len(model.calls) <= calls + coincided


@settings(max_examples=60, deadline=None)
@given(cases(["info_gain", "lookum"]), st.integers(1, 5), st.booleans())
def test_chunks_decide_as_all_logits_together_do_to_the_last_bit(case, chunk, ties):
    """Against the documented loop of `propose` and `select`; with ties, the first of the best candidates wins."""
    scheduler, tokens, seeds = case
    hashed = HashModel(tokens.shape[1], CODES, conditions=seeds)
    model = (lambda states, rows: torch.zeros(*states.shape, CODES)) if ties else hashed
    output = run(scheduler, tokens, seeds, model, lookahead_batch_size=chunk)
    own, samples = generators(*seeds), torch.arange(len(tokens))
    initial, length, logits, memory = (tokens == MASK).sum(-1), tokens.shape[1], None, None
    for index, timestep in enumerate(scheduler.timesteps):
        if not (tokens == MASK).any():
            break
        logits = model(tokens, samples) if logits is None else logits
        options = {"generator": own, "initial_masks": initial, "grid": (1, length), "memory": memory}
        proposal = scheduler.propose(logits, timestep, tokens, **options)
        lookahead = None
        if proposal.needs_lookahead:
            shape = proposal.candidates.shape
            every = model(proposal.candidates.flatten(0, 1), samples.repeat_interleave(shape[1]))
            lookahead = every.view(*shape, CODES)
        selected = scheduler.select(lookahead, timestep, proposal)
        for name in ("objective", "winner"):
            assert torch.equal(getattr(output.trace, name)[index].nan_to_num(9e9), getattr(selected, name).nan_to_num(9e9)), name
        tokens, logits, memory = selected.prev_sample, selected.pred_logits, proposal.memory
    assert torch.equal(output.tokens, tokens)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "kl"])
def test_memory_does_not_grow_with_the_candidates_run_one_by_one(reduction, masked, num_beams):
    made, alive = [], []
    hashed = HashModel(12, CODES)

    def denoise(tokens, rows):
        alive.append(sum(one() is not None for one in made))
        logits = hashed(tokens, rows)
        logits = logits[tokens == MASK] if masked else logits
        made.append(weakref.ref(logits))
        return logits

    most = []
    for num in (4, 32):
        scheduler = make_scheduler(MASK, 4, num_candidates=num, gain_reduction=reduction, certainty="margin")
        made.clear(), alive.clear()
        options = {"generator": generators(3), "lookahead_batch_size": 1}
        if num_beams == 1:
            decode(denoise, scheduler, torch.full((1, 12), MASK), **options)
        else:
            decode_beam(denoise, scheduler, torch.full((1, 12), MASK), num_beams=num_beams, **options)
        assert len(alive) > 2 * num
        most.append(max(alive))
    # the state's own logits, or each beam's, and the best ones' so far
    assert max(most) <= 2 * num_beams


@pytest.mark.parametrize("sampler", ["info_gain", "maskgit", "uniform"])
def test_the_first_samples_of_one_generator_do_not_depend_on_the_batch_size(sampler):
    scheduler, tokens = make_scheduler(MASK, 4, sampler=sampler), canvas(4, 12, 0.9)
    model = HashModel(12, CODES, conditions=range(4))
    four, two, one = (
        decode(model, scheduler, tokens[:batch], generator=torch.Generator().manual_seed(5)).tokens for batch in (4, 2, 1)
    )
    assert torch.equal(four[:2], two)
    assert torch.equal(four[:1], one)
    again = decode(model, scheduler, tokens, generator=torch.Generator().manual_seed(6)).tokens
    assert not torch.equal(again, four)


def test_equal_samples_of_a_batch_get_different_draws():
    output = decode(HashModel(12, CODES, [0] * 4), make_scheduler(MASK, 4), torch.full((4, 12), MASK))
    assert len(output.tokens.unique(dim=0)) == 4


def unbounded(scheduler) -> bool:
    """With a bound candidates differ in how much they decode, and a rejected one may be the state after the next step."""
    return scheduler.entropy_bound == 0


@settings(max_examples=40, deadline=None)
@given(cases(["info_gain", "lookum"]), st.none() | st.integers(1, 5))
def test_rows_are_one_plus_the_distinct_candidates_and_no_state_is_forwarded_twice(case, chunk):
    scheduler, tokens, seeds = case
    model = HashModel(tokens.shape[1], CODES, conditions=seeds)
    forwarded = []
    for sample, seed in enumerate(seeds):  # alone: there a lookahead runs only where the sample needs one
        own, expected, needed = HashModel(tokens.shape[1], CODES, [seed]), 0, None
        propose = scheduler.propose

        def watched(*args, propose=propose, **kwargs):
            nonlocal expected, needed
            expected += 0 if needed else 1
            proposal = propose(*args, **kwargs)
            needed = proposal.needs_lookahead
            if needed:
                expected += len({tuple(row) for row in proposal.candidates[0].tolist()})
            return proposal

        scheduler.propose = watched
        output = run(scheduler, tokens[sample : sample + 1], [seed], own)
        del scheduler.propose
        assert own.rows_of(0) == expected == output.trace.num_evaluations.sum()
        assert not unbounded(scheduler) or max(Counter(own.states).values(), default=1) == 1
        forwarded.append(own.rows_of(0))
    output = run(scheduler, tokens, seeds, model, lookahead_batch_size=chunk)
    assert output.trace.num_evaluations.sum(0).tolist() == forwarded
    assert [model.rows_of(sample) for sample in range(len(seeds))] == forwarded
    assert not unbounded(scheduler) or max(Counter(model.states).values(), default=1) == 1
    assert chunk is None or max(model.calls, default=0) <= chunk


@settings(max_examples=40, deadline=None)
@given(cases(GREEDY))
def test_greedy_rules_cost_one_row_a_step_and_sample(case):
    scheduler, tokens, seeds = case
    model = HashModel(tokens.shape[1], CODES, conditions=seeds)
    output = run(scheduler, tokens, seeds, model)
    assert torch.equal(output.trace.num_evaluations, (output.trace.num_decoded > 0).long())
    assert [model.rows_of(sample) for sample in range(len(seeds))] == output.trace.num_evaluations.sum(0).tolist()
    assert len(set(model.states)) == len(model.states)


@settings(max_examples=20, deadline=None)
@given(cases(("ancestral",)))
def test_a_step_that_decodes_nothing_costs_its_row(case):
    scheduler, tokens, seeds = case
    output = run(scheduler, tokens, seeds, HashModel(tokens.shape[1], CODES, conditions=seeds))
    left = (tokens == scheduler.config.mask_token_id).sum(-1) - output.trace.num_decoded.cumsum(0) + output.trace.num_decoded
    assert torch.equal(output.trace.num_evaluations, (left > 0).long())
    assert (output.tokens != scheduler.config.mask_token_id).all()


@settings(max_examples=40, deadline=None)
@given(cases())
def test_cumulative_entropy_counts_every_commit_with_the_entropies_of_its_own_state(case):
    scheduler, tokens, seeds = case
    model = HashModel(tokens.shape[1], CODES, conditions=seeds)
    output = run(scheduler, tokens, seeds, model)
    for sample in range(len(tokens)):
        steps = list(commits(model, tokens, output, sample))
        total = math.fsum(plain_entropy(row) for _, logits, positions in steps for row in logits[positions].tolist())
        assert output.trace.cumulative_entropy[sample].item() == pytest.approx(total, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(cases(["info_gain", "lookum"]))
def test_winner_has_the_largest_recorded_objective_and_its_gain_is_the_fall_of_uncertainty(case):
    scheduler, tokens, seeds = case
    model = HashModel(tokens.shape[1], CODES, conditions=seeds)
    output = run(scheduler, tokens, seeds, model)
    trace = output.trace
    compared = trace.objective.isfinite().all(-1)
    best = trace.objective.gather(-1, trace.winner[..., None])[..., 0]
    assert torch.equal(best[compared], trace.objective.amax(-1)[compared])
    assert not trace.winner[~compared].any()
    if scheduler.config.gain_reduction == "kl":  # which is no fall of uncertainty
        return
    scale = 1 if scheduler.config.gain_reduction == "sum" else None
    for sample in range(len(tokens)):
        steps = list(commits(model, tokens, output, sample))
        for index, ((state, logits, _), following) in enumerate(itertools.zip_longest(steps, steps[1:])):
            if trace.gain[index, sample].isnan():
                continue
            gain = 0.0
            for sign, here in ((1, (state, logits)), (-1, following)):
                if here is not None:
                    values = [plain_entropy(row) for row in here[1][here[0] == MASK].tolist()]
                    gain += sign * math.fsum(values) / (scale or len(values))
            assert trace.gain[index, sample].item() == pytest.approx(gain, abs=2e-5)


@pytest.mark.parametrize("sampler", ["info_gain", "margin", "klass"])
def test_positions_not_allowed_stay_masked(sampler):
    tokens, allowed = torch.full((2, 12), MASK), torch.zeros(2, 12).bool()
    allowed[0, :8], allowed[1, 4:6] = True, True
    output = decode(HashModel(12, CODES, (1, 2)), make_scheduler(MASK, 5, sampler=sampler), tokens, allowed=allowed)
    assert torch.equal(output.tokens == MASK, ~allowed)
    assert output.trace.num_decoded.sum(0).tolist() == [8, 2]
    schedule = make_scheduler(MASK, 5, sampler="margin")
    eight = decode(HashModel(8, CODES), schedule, torch.full((1, 8), MASK)).trace.num_decoded[:, 0]
    assert torch.equal(output.trace.num_decoded[:, 0], eight)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_partly_filled_canvas_follows_the_schedule_of_its_own_masks(share):
    tokens = canvas(3, 40, share)
    output = decode(HashModel(40, CODES, (0, 1, 2)), make_scheduler(MASK, 7, sampler="confidence"), tokens)
    for sample, masks in enumerate((tokens == MASK).sum(-1).tolist()):
        left = [masks - int(count) for count in output.trace.num_decoded[:, sample].cumsum(0)]
        assert left[:6] == [math.floor(masks * math.cos(math.pi * (i + 1) / 14)) for i in range(6)]


def test_nothing_masked_runs_no_model():
    tokens = canvas(2, 9, 0.0)
    model = HashModel(9, CODES, (0, 0))
    output = decode(model, make_scheduler(MASK, 5), tokens)
    assert torch.equal(output.tokens, tokens)
    assert model.calls == []
    assert output.trace.cumulative_entropy.tolist() == [0, 0]
    assert output.trace.decoded_at.tolist() == [[-1] * 9] * 2


def test_klass_sees_the_logits_of_the_step_before():
    scheduler, seen = make_scheduler(MASK, 4, sampler="klass"), []
    propose = scheduler.propose

    def watched(logits, *args, **kwargs):
        memory = kwargs["memory"]
        seen.append((logits, None if memory is None else memory.state["logits"]))
        return propose(logits, *args, **kwargs)

    scheduler.propose = watched
    decode(HashModel(12, CODES), scheduler, torch.full((1, 12), MASK))
    assert seen[0][1] is None
    assert all(torch.equal(now[1], before[0]) for before, now in itertools.pairwise(seen))


def test_callback_sees_every_step():
    steps, tokens = [], torch.full((2, 12), MASK)
    model, scheduler = HashModel(12, CODES, (1, 2)), make_scheduler(MASK, 4)
    output = decode(model, scheduler, tokens, generator=generators(1, 2), callback=steps.append)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [int(step.timestep) for step in steps] == [3, 2, 1, 0]
    assert torch.equal(steps[-1].tokens, output.tokens)
    states = [tokens, *(step.tokens for step in steps)]
    for index, step in enumerate(steps):
        assert torch.equal(step.logits, model(states[index], torch.arange(2)))
        assert torch.equal((step.tokens != states[index]), output.trace.selected[index])
        torch.testing.assert_close(step.scores, output.trace.objective[index], equal_nan=True)


@pytest.mark.parametrize("num_candidates", [3, 5, 8])
def test_every_step_decides_on_the_models_logits_of_its_state(num_candidates):
    """Also where equal candidates, of which only one was evaluated, have the largest objective."""
    tokens, model = torch.full((1, 12), MASK), HashModel(12, CODES)
    for seed in range(40):
        scheduler = make_scheduler(MASK, 3, 0.0, num_candidates=num_candidates, gain_reduction="mean")
        states = [tokens]

        def check(step, states=states):
            expected = model(states[-1], torch.zeros(1, dtype=torch.long))
            assert torch.equal(step.logits, expected)
            states.append(step.tokens)

        decode(model, scheduler, tokens, generator=generators(seed), callback=check)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sampler", ["info_gain", "confidence"])
def test_tokens_that_a_callback_returns_replace_the_state_and_its_logits(sampler, in_place):
    seen = []

    def edit(step):
        seen.append(step.logits)
        if step.index == 1:
            tokens = step.tokens if in_place else step.tokens.clone()
            tokens[:, :6] = 2
            edited.append(tokens.clone())
            return tokens
        return None

    edited, model = [], HashModel(12, CODES, (1, 2))
    scheduler = make_scheduler(MASK, 5, sampler=sampler)
    output = decode(model, scheduler, torch.full((2, 12), MASK), generator=generators(1, 2), callback=edit)
    assert torch.equal(seen[2], model(edited[0], torch.arange(2)))
    assert output.tokens[:, :6].eq(2).all()
    assert (output.tokens != MASK).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.full((2, 8), MASK, dtype=torch.int32), r"`tokens` must be a long tensor.*torch.int32 \(2, 8\)"),
        (torch.full((8,), MASK), r"`tokens` must be a long tensor.*\(8,\)"),
        (torch.full((2, 2, 4), MASK), r"`tokens` must be a long tensor.*\(2, 2, 4\)"),
    ],
)
def test_tokens_of_another_type_or_shape_are_an_error(tokens, message):
    with pytest.raises(ValueError, match=message):
        decode(HashModel(8, CODES), make_scheduler(MASK, 4), tokens)


@pytest.mark.parametrize("chunk", [0, -1, 2.5])
def test_invalid_chunk_is_an_error(chunk):
    with pytest.raises(ValueError, match=f"`lookahead_batch_size` must be an integer >= 1 or None, got {chunk}"):
        decode(HashModel(8, CODES), make_scheduler(MASK, 4), torch.full((1, 8), MASK), lookahead_batch_size=chunk)


def test_scheduler_without_timesteps_is_an_error():
    scheduler = make_scheduler(MASK, 4)
    scheduler.timesteps = None
    with pytest.raises(ValueError, match="`scheduler` has no timesteps: call its `set_timesteps` first"):
        decode(HashModel(8, CODES), scheduler, torch.full((1, 8), MASK))


@pytest.mark.parametrize("allowed", [torch.ones(2, 7).bool(), torch.ones(2, 8), torch.ones(1, 8).bool()])
def test_allowed_of_another_shape_or_type_is_an_error(allowed):
    with pytest.raises(ValueError, match="`allowed` must be bool"):
        decode(HashModel(8, CODES, (0, 0)), make_scheduler(MASK, 4), torch.full((2, 8), MASK), allowed=allowed)


def test_wrong_number_of_generators_is_an_error():
    with pytest.raises(ValueError, match="list of 3 generators for a batch of 2 samples"):
        decode(HashModel(8, CODES), make_scheduler(MASK, 4), torch.full((2, 8), MASK), generator=generators(1, 2, 3))


def test_logits_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match="`logits` must have the shape"):
        decode(lambda tokens, rows: random_logits(len(tokens), 7, CODES), make_scheduler(MASK, 4), torch.full((2, 8), MASK))


def test_nan_that_appears_on_the_way_is_an_error_with_step_and_sample():
    model = HashModel(8, CODES, (1, 2))

    def broken(tokens, rows):
        logits = model(tokens, rows)
        logits[(rows == 1) & ((tokens != MASK).sum(-1) > 2)] = math.nan
        return logits

    scheduler = functools.partial(make_scheduler, MASK, 8, tokens_per_step=1)
    with pytest.raises(ValueError, match="at step 2, sample 1, candidate"):
        decode(broken, scheduler(), torch.full((2, 8), MASK), generator=generators(1, 2))
    with pytest.raises(ValueError, match="at step 3, sample 1, position"):
        decode(broken, scheduler(sampler="margin"), torch.full((2, 8), MASK), generator=generators(1, 2))


def test_masks_that_a_callback_leaves_after_the_last_step_are_an_error():
    scheduler = make_scheduler(MASK, 2, sampler="confidence")
    with pytest.raises(ValueError, match="`callback` masked tokens again after the last step"):
        decode(HashModel(8, CODES, (0,)), scheduler, torch.full((1, 8), MASK), callback=lambda s: torch.full_like(s.tokens, MASK))


def test_the_log_likelihood_is_that_of_the_tokens_under_the_logits_they_were_drawn_from():
    model = HashModel(8, 5)
    scheduler = make_scheduler(5, 4, sampler="maskgit", token_temperature=0.5, top_p=0.9)  # at temperature 1 all the same
    trail = []
    output = decode(model, scheduler, torch.full((1, 8), 5), generator=generators(3), callback=lambda step: trail.append(step))
    total, before = 0.0, torch.full((1, 8), 5)
    for step in trail:
        chosen = before != step.tokens
        log_p = step.logits.log_softmax(-1).gather(-1, step.tokens.clamp(max=4)[..., None])[..., 0]
        total += log_p[chosen].sum().item()
        before = step.tokens.clone()
    assert output.trace.log_likelihood.item() == pytest.approx(total, rel=1e-5)
