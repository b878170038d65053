"""Correctors: the formulas against naive ones, what a run masks again, what it keeps, and what it costs."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers.sampling import HashModel, assert_the_same_alone, generators, make_scheduler, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import InfoGainScheduler, correctors, decode, decode_beam, decode_best_of, schedules
from diffusers_infogain.correctors import CORRECTORS
from diffusers_infogain.evaluation.exact import exact_denoise, nearest_distance
from diffusers_infogain.masked_logits import MaskedLogits
from diffusers_infogain.rules import SAMPLERS
from diffusers_infogain.settings import SETTINGS
from diffusers_infogain.step import Memory

CODES, MASK = 5, 5
NAMES = tuple(name for name in CORRECTORS if name is not None)
GRID = (3, 4)
LENGTH = 12


def canvas(batch: int, share: float = 1.0, seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    known = torch.randint(CODES, (batch, length), generator=generator)
    return torch.where(torch.rand(batch, length, generator=generator) < share, MASK, known)


@st.composite
def cases(draw, names=NAMES, samplers=tuple(SAMPLERS)):
    """A scheduler with a corrector that has much to do, tokens and seeds."""
    name, sampler = draw(st.sampled_from(names)), draw(st.sampled_from(samplers))
    config = {
        "corrector": name,
        "sampler": sampler,
        "num_candidates": draw(st.integers(1, 3)),
        "certainty": draw(st.sampled_from(["maskgit", "klass", "halton", "pivot"])),
        "masking_schedule": draw(st.sampled_from(["cosine", "linear", "arccos", "even"])),
        "verify_threshold": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "verify_classes": draw(st.integers(2, 5)),
        "p2_eta": draw(st.sampled_from([0.0, 1.0, 3.0])),
        "remdm_eta": draw(st.sampled_from([None, 0.3, 1.0])),
    }
    if not SAMPLERS[sampler].bound_only:
        config["entropy_bound"] = 0 if name == "remdm_loop" else draw(st.sampled_from([0, 1.0]))
    elif name == "remdm_loop":
        config["sampler"], config["entropy_bound"] = "klass", 0
    if name != "remdm_loop":
        config["tokens_per_step"] = draw(st.sampled_from([None, 1, 3]))
    scheduler = make_scheduler(MASK, draw(st.integers(1, 12)), **config)
    tokens = canvas(draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 0.4, 1.0])), draw(st.integers(0, 99)))
    seeds = draw(st.lists(st.integers(0, 10**6), min_size=len(tokens), max_size=len(tokens)))
    return scheduler, tokens, seeds


def run(scheduler, tokens, seeds, model=None, **options):
    model = model or HashModel(tokens.shape[1], CODES, conditions=seeds)
    return decode(model, scheduler, tokens, generator=generators(*seeds), grid=GRID, **options)


@settings(max_examples=120, deadline=None)
@given(cases())
def test_no_mask_is_left_and_known_tokens_never_change(case):
    scheduler, tokens, seeds = case
    seen = []

    def model(states, rows):
        seen.append((states, rows))
        return HashModel(LENGTH, CODES, conditions=seeds)(states, rows)

    before, known = tokens.clone(), tokens != MASK
    output = run(scheduler, tokens, seeds, model)
    assert torch.equal(tokens, before)
    assert ((output.tokens >= 0) & (output.tokens < CODES)).all()
    for states, rows in seen:
        assert torch.equal(states[known[rows]], tokens[rows][known[rows]])
    trace = output.trace
    assert len(trace.cost) <= len(scheduler.timesteps) + correctors.num_own_steps(scheduler.config)
    assert trace.num_evaluations.sum() == sum(len(rows) for _, rows in seen)
    assert torch.equal(trace.decoded_at >= 0, ~known)
    assert not (trace.selected & known).any()
    assert torch.equal(trace.selected.sum(-1), trace.num_decoded)
    assert trace.cost.isfinite().all()
    assert torch.equal(trace.cost > 0, trace.num_decoded > 0)


@settings(max_examples=80, deadline=None)
@given(cases(), st.none() | st.integers(1, 4))
def test_a_sample_is_the_same_alone_and_in_any_batch_for_any_chunk(case, chunk):
    assert_the_same_alone(run, *case, chunk)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_correctors_that_are_switched_off_leave_the_sampler_draw_for_draw(case):
    scheduler, tokens, seeds = case
    if scheduler.config.corrector in ("verify", "remdm_loop", "edit"):
        return  # which take steps, or have a schedule, of their own
    off = InfoGainScheduler.from_config(scheduler.config, remdm_eta=0, p2_eta=0)
    plain = InfoGainScheduler.from_config(scheduler.config, corrector=None)
    for own in (off, plain):
        own.set_timesteps(len(scheduler.timesteps))
    one, other = run(off, tokens, seeds), run(plain, tokens, seeds)
    assert torch.equal(one.tokens, other.tokens)
    for name, value in one.trace.tensors().items():
        assert torch.equal(value.nan_to_num(9e9), getattr(other.trace, name).nan_to_num(9e9)), name


# verify


def naive_class(position: int, width: int, n: int) -> int:
    return (position % width + math.isqrt(n) * (position // width)) % n


@pytest.mark.parametrize("grid", [None, GRID, (4, 3)], ids=str)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 9])
def test_classes_are_spread_evenly(n, grid):
    classes = correctors.residue_classes(LENGTH, grid, n)
    width = LENGTH if grid is None else grid[1]
    assert classes.tolist() == [naive_class(position, width, n) for position in range(LENGTH)]
    # No two neighbours are masked together, from 4 classes on not even diagonal ones.
    for one, other in itertools.combinations(range(LENGTH), 2):
        across, down = abs(one % width - other % width), abs(one // width - other // width)
        if across + down == 1 or (n > 3 and max(across, down) == 1):
            assert classes[one] != classes[other]


def test_a_token_is_plausible_by_its_share_of_the_largest_probability():
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]).log().expand(3, 2, 3)
    tokens = torch.tensor([[0, 0], [1, 1], [2, 2]])
    assert correctors.is_plausible(logits, tokens, 0.33).tolist() == [[True, True], [True, True], [False, True]]
    assert correctors.is_plausible(logits, tokens, 0.51).tolist() == [[True, False], [False, False], [False, True]]
    impossible = torch.tensor([[0.0, -math.inf]])
    assert correctors.is_plausible(impossible, torch.tensor([1]), 0.0).tolist() == [True]
    assert correctors.is_plausible(impossible, torch.tensor([1]), 1e-6).tolist() == [False]


@settings(max_examples=40, deadline=None)
@given(cases(names=("verify",)))
def test_with_threshold_0_verify_keeps_everything_for_a_row_a_class(case):
    scheduler, tokens, seeds = case
    scheduler = InfoGainScheduler.from_config(scheduler.config, verify_threshold=0.0)
    plain = InfoGainScheduler.from_config(scheduler.config, corrector=None)
    for own in (scheduler, plain):
        own.set_timesteps(6)
    verified, output = run(scheduler, tokens, seeds), run(plain, tokens, seeds)
    assert torch.equal(verified.tokens, output.tokens)
    torch.testing.assert_close(verified.trace.cumulative_entropy, output.trace.cumulative_entropy)
    assert torch.equal(verified.trace.decoded_at, output.trace.decoded_at)
    n, width = scheduler.config.verify_classes, GRID[1]
    for b in range(len(tokens)):
        decoded = (tokens[b] == MASK).nonzero()[:, 0].tolist()
        classes = {naive_class(position, width, n) for position in decoded}
        added = verified.trace.num_evaluations[:, b].sum() - output.trace.num_evaluations[:, b].sum()
        assert added == len(classes)


@pytest.mark.parametrize("config", [{"sampler": "uniform"}, {"sampler": "info_gain"}, {"sampler": "klass_parallel"}], ids=str)
@pytest.mark.parametrize("bound", [0, 0.5])
def test_verify_by_brute_force(config, bound):
    """Class after class, on the states that the model saw: what is implausible, and only that, is drawn anew or stays masked."""
    scheduler = make_scheduler(MASK, 3, **config, corrector="verify", verify_threshold=0.5, entropy_bound=bound)
    plain = InfoGainScheduler.from_config(scheduler.config, corrector=None)
    tokens = canvas(1, 0.8, seed=4)
    kept = redrawn = 0
    for seed in (11, 12, 13):
        model, states = HashModel(LENGTH, CODES, conditions=(3,)), []
        before = run(plain, tokens, [seed], model, num_inference_steps=3).tokens[0]
        output = run(scheduler, tokens, [seed], model, callback=lambda step, states=states: states.append(step.tokens[0].clone()))
        first = next(index for index, state in enumerate(states) if torch.equal(state, before)) + 1
        for number, after in enumerate(states[first : first + 4]):
            in_class = (tokens[0] == MASK) & (correctors.residue_classes(LENGTH, GRID, 4) == number)
            doubted = in_class & (before != MASK)
            seen = before.masked_fill(doubted, MASK)
            assert (0, tuple(seen.tolist())) in model.states
            log_p = model(seen[None], torch.tensor([0]))[0].log_softmax(-1)
            share = log_p.gather(-1, before.clamp(max=CODES - 1)[:, None])[:, 0] - log_p.amax(-1)
            stays = doubted & (share >= math.log(0.5))
            assert torch.equal(after[stays], before[stays])
            assert torch.equal(after[seen != MASK], before[seen != MASK])
            failed = (seen == MASK) & ~stays
            decoded = output.trace.selected[first + number, 0]
            assert torch.equal(decoded, failed & (after != MASK))
            entropies = torch.special.entr(log_p.exp()).sum(-1)[decoded]
            most = -(-int(failed.sum()) // (8 - number))
            assert decoded.sum() == most or (bound and entropies.sum() - entropies.max() <= bound + 1e-5)
            kept, redrawn, before = kept + int(stays.sum()), redrawn + int(failed.sum()), after
    assert kept > 0
    assert redrawn > 0


PERMUTATIONS = torch.tensor(list(itertools.permutations(range(3))))


def permutations(config, seeds: int, steps: int, count: int = 3000):
    """Samples of a model that knows the permutations of 3 tokens, all alike, and its exact marginals."""
    scheduler = make_scheduler(3, steps, sampler="uniform", **config)
    tokens = torch.full((count, 3), 3)
    return decode(exact_denoise(PERMUTATIONS, 3, 20.0), scheduler, tokens, generator=torch.Generator().manual_seed(seeds))


def is_uniform(tokens: torch.Tensor) -> bool:
    """Whether permutations (B, 3) are as evenly distributed as draws are: χ² with 5 degrees of freedom, p > 0.001."""
    found = Counter(map(tuple, tokens.tolist()))
    expected = len(tokens) / 6
    return sum((found[tuple(each)] - expected) ** 2 / expected for each in PERMUTATIONS.tolist()) < 20.5


def test_verify_leaves_samples_as_they_are_if_marginals_are_exact():
    plain = permutations({"tokens_per_step": 1}, 1, 3)
    verified = permutations({"tokens_per_step": 1, "corrector": "verify", "verify_classes": 3}, 1, 3)
    assert is_uniform(plain.tokens)
    assert torch.equal(plain.tokens, verified.tokens)
    assert verified.trace.num_decoded.sum() == plain.trace.num_decoded.sum()
    assert (verified.trace.num_evaluations.sum(0) == 6).all()


def test_verify_mends_what_was_drawn_independently_and_keeps_the_distribution_even():
    independent = permutations({}, 2, 1)
    verified = permutations({"corrector": "verify", "verify_classes": 3}, 2, 1)
    valid = [nearest_distance(output.tokens, PERMUTATIONS) == 0 for output in (independent, verified)]
    assert 0.2 < valid[0].double().mean() < 0.25  # 6 of 27
    assert valid[1].double().mean() > 0.75
    assert torch.equal(verified.tokens[valid[0]], independent.tokens[valid[0]])
    assert is_uniform(verified.tokens[valid[1]])


def test_candidates_are_not_compared_while_a_sample_is_verified_beside_one_that_looks_ahead():
    scheduler = make_scheduler(MASK, 8, sampler="info_gain", corrector="verify", verify_threshold=1.0)
    tokens = canvas(2)
    tokens[0, torch.arange(LENGTH).remainder(6) > 2] = 1  # a class has several of what is left, of which a step draws one
    together = run(scheduler, tokens, [1, 2])
    for b in range(2):
        alone = run(scheduler, tokens[b : b + 1], [1 + b])
        assert torch.equal(alone.tokens[0], together.tokens[b])
        assert alone.trace.num_states.sum() == together.trace.num_states[:, b].sum()
    num_masked = (tokens[0] == MASK).sum()
    first_verified = int((together.trace.num_decoded[:, 0].cumsum(0) < num_masked).sum()) + 1
    assert together.trace.num_states[first_verified:, 0].max() == 1
    assert together.trace.num_states[first_verified:, 1].max() > 1


def test_rows_of_verify_are_those_of_the_draft_and_one_a_class_if_what_fails_is_within_the_bound():
    scheduler = make_scheduler(MASK, 4, sampler="maskgit", entropy_bound=1e6, corrector="verify")
    output = run(scheduler, canvas(3), [1, 2, 3])
    assert output.trace.num_evaluations.sum(0).tolist() == [5, 5, 5]


# ReMDM


def naive_conf(probability, decoded, alpha_t, alpha_s):
    weights = [math.exp(-p) if d else 0.0 for p, d in zip(probability, decoded, strict=True)]
    limit = min(1.0, (1 - alpha_s) / alpha_t)
    return [weight / sum(weights) * limit for weight in weights]


def correction(**values):
    base = {
        "config": make_scheduler(MASK, 4, corrector="remdm_conf", sampler="uniform").config,
        "index": 1,
        "num_steps": 4,
        "logits": random_logits(1, 6, CODES),
        "log_probability": torch.zeros(1, 6),
    }
    return correctors.CorrectionStep(**{**base, **values})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.integers(1, 5), st.integers(0, 4))
def test_remdm_conf_masks_each_token_again_with_the_published_probability(probability, num_decoded, num_left):
    num_left = min(num_left, 6 - num_decoded)
    decoded = torch.arange(6) < num_decoded
    count = 20000
    expected = naive_conf(probability, decoded.tolist(), num_decoded / 6, 1 - num_left / 6)
    uniform = torch.rand(count, 6, generator=torch.Generator().manual_seed(0))
    step = correction(
        tokens=torch.where(decoded, 0, MASK).expand(count, 6),
        masked=~decoded.expand(count, 6),
        decoded=decoded.expand(count, 6),
        num_left=torch.full((count,), 6),
        probability=torch.tensor(probability).expand(count, 6),
        uniforms=lambda: uniform,
    )
    # The limit of α_s is that of `num_left`, the cap on how many is lifted so that each is drawn by itself.
    total = torch.tensor(6.0)
    sigma = correctors.remdm_confidence(step.probability, step.decoded) * correctors.remdm_limit(
        num_decoded / total, 1 - num_left / total
    )
    torch.testing.assert_close(sigma[0].tolist(), expected, rtol=1e-5, atol=1e-7)
    rates = correctors.draw_remasked(sigma, uniform, step.num_left).double().mean(0)
    for rate, p in zip(rates.tolist(), expected, strict=True):
        assert abs(rate - p) <= 5 * math.sqrt(p * (1 - p) / count) + 1e-9


def test_no_more_is_masked_again_than_the_schedule_leaves():
    uniform = torch.tensor([[0.1, 0.5, 0.3, 0.9]])
    sigma = torch.tensor([[1.0, 1.0, 0.4, 0.5]])
    drawn = [correctors.draw_remasked(sigma, uniform, torch.tensor([most]))[0].tolist() for most in range(4)]
    assert drawn == [[False] * 4, [True, False, False, False], [True, True, False, False], [True, True, True, False]]


@pytest.mark.parametrize(("name", "eta"), [("remdm_conf", None), ("remdm_conf", 0.4), ("remdm_loop", 0.3), ("p2", 1.0)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "even"])
def test_masks_after_each_step_follow_the_schedule(name, eta, schedule):
    """A step decodes as many tokens more as it masks again, so the masks are those of the schedule, exactly."""
    settings_of = {"p2_eta": eta} if name == "p2" else {"remdm_eta": eta}
    config = {"sampler": "uniform", "masking_schedule": schedule, "corrector": name}
    scheduler = make_scheduler(MASK, 6, **config, **settings_of)
    tokens, masks = canvas(4, 0.8, seed=3), []
    run(scheduler, tokens, [1, 2, 3, 4], callback=lambda step: masks.append((step.tokens == MASK).sum(-1)))
    initial = (tokens == MASK).sum(-1)
    left, expected = initial, []
    for index in range(6):
        if name == "remdm_loop":
            share = correctors.remdm_loop_share((index + 1) / 6, schedule, 0.55, 0.05, 0.9)
            left = torch.minimum(left, (initial * share).round().long())
        else:
            left = left - schedules.decode_counts(left, index, 6, schedule, initial_masks=initial)
        expected.append(left)
    assert torch.equal(torch.stack(masks), torch.stack(expected))


def naive_loop_share(u, r, t_on=0.55, t_off=0.05, alpha_on=0.9):
    t = 1 - u
    if t > t_on:
        return 1 - alpha_on * (1 - r(u / (1 - t_on)))
    if t >= t_off:
        return 1 - alpha_on
    return (1 - alpha_on) * r((t_off - t) / t_off)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "arccos", "even"])
def test_the_loop_rises_stays_and_rises(schedule):
    r = {"cosine": lambda u: math.cos(math.pi * u / 2), "arccos": lambda u: 2 * math.acos(u) / math.pi}.get(
        schedule, lambda u: 1 - u
    )
    shares = [correctors.remdm_loop_share(u / 40, schedule, 0.6, 0.2, 0.8) for u in range(41)]
    expected = [naive_loop_share(u / 40, r, 0.6, 0.2, 0.8) for u in range(41)]
    assert shares == pytest.approx(expected, abs=1e-6)
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(0, abs=1e-6)
    assert shares[16:33] == pytest.approx([0.2] * 17)


def test_remdm_by_enumeration_of_the_posterior():
    """Uniform order: a step masks a decoded token again with σ, and decodes a mask with (α_s - (1 - σ) α_t) / (1 - α_t)."""
    length, count = 10, 8000
    config = {"sampler": "uniform", "masking_schedule": "linear", "corrector": "remdm_loop", "remdm_eta": 0.2}
    scheduler = make_scheduler(MASK, 10, **config, remdm_t_on=0.6, remdm_t_off=0.1, remdm_alpha_on=0.5)
    sigma, alpha = 0.2, 0.5
    states = []
    decode(
        lambda tokens, rows: torch.zeros(len(tokens), length, CODES),
        scheduler,
        torch.full((count, length), MASK),
        generator=torch.Generator().manual_seed(0),
        callback=lambda step: states.append(step.tokens == MASK),
    )
    checked = 0
    for index in range(4, 9):  # t from 0.6 to 0.2
        before, after = states[index - 1], states[index]
        remasked = after[~before].double().mean().item()
        decoded = (~after)[before].double().mean().item()
        assert remasked == pytest.approx(sigma, abs=0.01)
        assert decoded == pytest.approx((alpha - (1 - sigma) * alpha) / (1 - alpha), abs=0.01)
        assert (after.sum(-1) == length * (1 - alpha)).all()
        checked += 1
    assert checked == 5
    assert not (states[2] & ~states[1]).any()  # before t_on nothing is masked again


@pytest.mark.parametrize("candidates", [1, 4])
def test_remdm_conf_goes_by_the_probabilities_at_which_tokens_were_decoded(candidates):
    """Which candidate was committed is seen from the tokens: the probabilities are those of the states that they came from."""
    scheduler = make_scheduler(MASK, 6, sampler="info_gain", num_candidates=candidates, corrector="remdm_conf")
    model = HashModel(LENGTH, CODES, conditions=(1, 2))
    tokens, memory, expected = canvas(2), None, torch.zeros(2, LENGTH)
    streams = generators(5, 6)
    for timestep in scheduler.timesteps:
        rows = torch.arange(2)
        logits = model(tokens, rows)
        seen = correctors.Correction(scheduler.config, logits, tokens, tokens == MASK, memory, 0, 6)
        torch.testing.assert_close(torch.where(tokens == MASK, 0, seen._probability()), torch.where(tokens == MASK, 0, expected))
        proposal = scheduler.propose(logits, timestep, tokens, generator=streams, memory=memory)
        lookahead = torch.stack([model(state, rows) for state in proposal.candidates.unbind(1)], 1)
        output = scheduler.select(lookahead if proposal.needs_lookahead else None, timestep, proposal)
        new = (tokens == MASK) & (output.prev_sample != MASK)
        p = logits.softmax(-1).gather(-1, output.prev_sample.clamp(max=CODES - 1)[..., None])[..., 0]
        expected = torch.where(new, p, expected)
        tokens, memory = output.prev_sample, proposal.memory
    assert (tokens != MASK).all()


# P2


def naive_p2(logits, tokens, drawn, fixed, num_to_mask, eta):
    """The published loop's choice for one sample: score all, mask the lowest."""
    log_p = logits.log_softmax(-1)
    scores = {}
    for position in range(len(tokens)):
        if fixed[position]:
            continue
        masked = tokens[position] == MASK
        token = drawn[position] if masked else tokens[position]
        scores[position] = log_p[position, token].item() * (1 if masked else eta)
    lowest = sorted(scores, key=scores.get)[:num_to_mask]
    new = tokens.clone()
    for position in scores:
        if position in lowest:
            new[position] = MASK
        elif tokens[position] == MASK:
            new[position] = drawn[position]
    return new


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 4.0])
def test_p2_with_the_log_probability_rule_is_the_published_loop(eta):
    scheduler = make_scheduler(
        MASK, 6, sampler="maskgit", choice_temperature=0, corrector="p2", p2_eta=eta, masking_schedule="linear"
    )
    model, tokens = HashModel(LENGTH, CODES, conditions=(7,)), canvas(1, 0.9, seed=2)
    fixed, state, remasked = tokens[0] != MASK, tokens, 0
    stream, memory = generators(3), None
    initial = (tokens == MASK).sum(-1)
    for index, timestep in enumerate(scheduler.timesteps):
        logits = model(state, torch.tensor([0]))
        own = torch.Generator()
        own.set_state(stream[0].get_state())
        uniform = torch.rand(1, 2, LENGTH, generator=own)[0, 0]
        cdf = logits[0].softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
        num_to_mask = int(initial * (1 - (index + 1) / 6) + 1e-6) if index < 5 else 0
        expected = naive_p2(logits[0], state[0], drawn, fixed, num_to_mask, eta)
        proposal = scheduler.propose(logits, timestep, state, generator=stream, memory=memory, initial_masks=initial)
        remasked += int(((state[0] != MASK) & (expected == MASK)).sum())
        state, memory = scheduler.select(None, timestep, proposal).prev_sample, proposal.memory
        assert torch.equal(state[0], expected)
    assert remasked == 0 if eta == 0 else remasked > 0


def test_p2_takes_logits_at_any_positions_but_needs_those_of_decoded_ones():
    scheduler = make_scheduler(MASK, 6, sampler="uniform", corrector="p2", p2_eta=2.0)
    model = HashModel(LENGTH, CODES, conditions=(1, 2))
    tokens = canvas(2, 0.7)
    undecided = tokens == MASK

    def at_decodable(states, rows):
        return MaskedLogits.at(undecided[rows], model(states, rows)[undecided[rows]])

    def at_masks(states, rows):
        return model(states, rows)[states == MASK]

    assert torch.equal(run(scheduler, tokens, [1, 2], at_decodable).tokens, run(scheduler, tokens, [1, 2], model).tokens)
    with pytest.raises(ValueError, match=r"`denoise` must return logits at decoded positions, too, with the corrector 'p2'."):
        run(scheduler, tokens, [1, 2], at_masks)


# edit


def test_a_token_is_replaced_by_one_that_is_probable_enough():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]]).log()
    assert correctors.edited(logits, torch.tensor([1, 1, 2]), 0.5).tolist() == [1, 0, 2]
    assert correctors.edited(logits, torch.tensor([1, 1, 1]), 0.0).tolist() == [0, 0, 2]
    assert correctors.edited(logits, torch.tensor([1, 1, 1]), 1.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("post", "steps"), [(0, 1), (2, 3), (9, 4)])
def test_edits_go_on_until_nothing_is_replaced_or_no_step_is_left(post, steps):
    """A model that wants each token to be one more than it is, up to 3, and that fills masks with 0."""

    def denoise(states, rows):
        wanted = torch.where(states == MASK, 0, (states + 1).clamp(max=3))
        return torch.nn.functional.one_hot(wanted, CODES).float() * 20

    scheduler = make_scheduler(MASK, 1, sampler="confidence", corrector="edit", max_post_steps=post, tokens_per_step=None)
    tokens = torch.full((2, 6), MASK)
    tokens[1] = 4  # finished from the start: never edited, nor is a known token
    tokens[0, 2] = 4
    output = decode(denoise, scheduler, tokens, generator=generators(0, 1))
    reached = min(post + 1, 3)
    assert output.tokens.tolist() == [[reached, reached, 4, reached, reached, reached], [4] * 6]
    assert output.trace.num_evaluations.sum(0).tolist() == [1 + steps, 0]
    assert output.trace.num_decoded.sum(0).tolist() == [5, 0]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("p2", "edit")])
@pytest.mark.parametrize("sampler", ["info_gain", "klass", "klass_parallel", "uniform"])
def test_logits_at_masks_suffice_for_the_others(name, sampler):
    config = {"sampler": sampler, "corrector": name, "verify_threshold": 0.8, "remdm_eta": 1.0}
    scheduler = make_scheduler(MASK, 8, **config)
    model = HashModel(LENGTH, CODES, conditions=(1, 2))
    dense = run(scheduler, canvas(2), [1, 2], model)
    sparse = run(scheduler, canvas(2), [1, 2], lambda states, rows: model(states, rows)[states == MASK])
    assert torch.equal(dense.tokens, sparse.tokens)
    assert torch.equal(dense.trace.num_evaluations, sparse.trace.num_evaluations)
    assert dense.trace.selected.sum() > 2 * LENGTH


# Together with the rest


@pytest.mark.parametrize("name", NAMES)
def test_best_of_n_keeps_the_run_with_the_smallest_entropy_of_all_draws(name):
    scheduler = make_scheduler(MASK, 5, sampler="uniform", corrector=name)
    model = HashModel(LENGTH, CODES, conditions=(1, 2))
    output = decode_best_of(model, scheduler, canvas(2), num_runs=3, generator=generators(1, 2), grid=GRID)
    assert (output.tokens != MASK).all()
    assert output.trace.num_evaluations.sum() == len(model.states)


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_may_change_tokens_and_none_is_lost(name):
    scheduler = make_scheduler(MASK, 5, sampler="klass", corrector=name)

    def edit(step):
        step.tokens[:, 0] = 1
        if step.index == 2:
            step.tokens[:, 3:5] = MASK

    output = run(scheduler, canvas(2), [1, 2], callback=edit)
    assert (output.tokens[:, 0] == 1).all()
    assert (output.tokens != MASK).all()


@pytest.mark.parametrize("name", ["verify", "p2"])
def test_an_interruption_keeps_what_is_decoded(name):
    scheduler = make_scheduler(MASK, 3, sampler="uniform", corrector=name)
    asked = []
    output = run(scheduler, canvas(2), [1, 2], interrupted=lambda: asked.append(1) or len(asked) > 4)
    plain = make_scheduler(MASK, 3, sampler="uniform")
    if name == "verify":
        assert len(output.trace.cost) == 4
        draft = run(plain, canvas(2), [1, 2]).tokens
        others = correctors.residue_classes(LENGTH, GRID, 4) != 0
        assert torch.equal(output.tokens[:, others], draft[:, others])
    else:
        assert (output.tokens != MASK).all()


ERRORS = [
    ({"corrector": "gibbs"}, "`corrector` must be one of verify, remdm_conf, remdm_loop, p2, edit or None, got 'gibbs'."),
    ({"verify_threshold": 1.5}, "`verify_threshold` must be a number in [0, 1], got 1.5."),
    ({"verify_classes": 1}, "`verify_classes` must be an integer >= 2, got 1."),
    ({"remdm_eta": 2}, "`remdm_eta` must be a number in [0, 1] or None, got 2."),
    ({"remdm_alpha_on": 0}, "`remdm_alpha_on` must be a number in (0, 1], got 0."),
    ({"p2_eta": -1}, "`p2_eta` must be a number >= 0, got -1."),
    ({"remdm_t_on": 0.05}, "`remdm_t_off` must be below `remdm_t_on`, got 0.05 and 0.05: t falls from 1 to 0."),
    (
        {"corrector": "remdm_loop", "tokens_per_step": 2, "entropy_bound": 0},
        "`tokens_per_step` must be None with the corrector 'remdm_loop', which has a schedule of its own, got 2.",
    ),
    (
        {"corrector": "remdm_loop"},
        "`entropy_bound` must be 0 with the corrector 'remdm_loop', which has a schedule of its own, got 0.5 (in use with the "
        "sampler 'info_gain').",
    ),
    (
        {"corrector": "verify", "retry_below_sigmas": -2.0},
        "`retry_below_sigmas` must be None with the corrector 'verify', got -2.0.",
    ),
]


@pytest.mark.parametrize(("config", "message"), ERRORS, ids=[str(config) for config, _ in ERRORS])
def test_settings_that_do_not_fit(config, message):
    with pytest.raises(ValueError) as error:
        InfoGainScheduler(MASK, **config)
    assert str(error.value) == message


def test_what_cannot_be_corrected():
    scheduler = make_scheduler(MASK, 4, sampler="uniform", corrector="verify")
    with pytest.raises(ValueError) as error:
        scheduler.step(random_logits(1, LENGTH, CODES), 3, canvas(1))
    expected = (
        "`step` cannot mask tokens again as the corrector 'verify' does: use `InfoGainPipeline` or `decode`, or `corrector` None."
    )
    assert str(error.value) == expected
    with pytest.raises(ValueError) as error:
        scheduler.propose(random_logits(1, LENGTH, CODES), 3, canvas(1), memory=Memory())
    expected = "`memory` must be None in the first step, and then that of the proposal before, with the corrector 'verify'."
    assert str(error.value) == expected
    beams = make_scheduler(MASK, 4, sampler="info_gain", corrector="p2")
    with pytest.raises(ValueError, match=r"`corrector` of the scheduler must be None for a beam search, got 'p2'."):
        decode_beam(HashModel(LENGTH, CODES), beams, canvas(1), num_beams=2)


def test_the_names_of_the_settings_are_those_that_are_registered():
    assert SETTINGS["corrector"].choices == NAMES
