"""Every rule of the scheduler against a plain Python version of it."""

import math

import pytest
import torch
from helpers.reference import plain_entropy, plain_evaluation, plain_gumbel, plain_kl, plain_token, probabilities, top_positions
from helpers.sampling import HashModel, generators, make_scheduler, partly_known, plain_frequencies, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import decode, reductions
from diffusers_infogain.candidates import draw_uniforms
from diffusers_infogain.rules import RULES, SAMPLERS, halton_order
from diffusers_infogain.schedules import annealed_inversely, temperature_at
from diffusers_infogain.scoring import entropy
from diffusers_infogain.step import Memory

MASK, BATCH, LENGTH, STEPS = 7, 3, 12, 5
GRID = (3, 4)
DETERMINISTIC = ("confidence", "entropy", "margin", "halton", "left", "klass")
CERTAINTIES = tuple(RULES)
PARALLEL_SAMPLERS = ("confidence_parallel", "klass_parallel", "factor_parallel", "frechet_parallel")
SAME_POSITIONS = (*DETERMINISTIC, "pivot")


def state(seed: int = 0, share: float = 0.7) -> torch.Tensor:
    return partly_known(BATCH, LENGTH, MASK, seed, share)


def plain_phi(rule, position, logits, previous, token, uniform, temperature):
    p = sorted(probabilities(logits), reverse=True)
    settled = plain_kl(logits, previous) < 5e-4
    frequency = plain_frequencies()[token] or min(f for f in plain_frequencies() if f > 0)
    return {
        "confidence": lambda: p[0],
        "maskgit": lambda: math.log(probabilities(logits)[token]) + temperature * plain_gumbel(uniform),
        "titok": lambda: logits[token] + temperature * plain_gumbel(uniform),
        "entropy": lambda: -plain_entropy(logits),
        "margin": lambda: p[0] - p[1],
        "uniform": lambda: uniform,
        "halton": lambda: -halton_order(*GRID)[position].item(),
        "left": lambda: -position,
        "klass": lambda: p[0] + settled,
        "pivot": lambda: -plain_entropy(logits),
        "pc_sampler": lambda: math.exp(-0.25 * position) * min(-probabilities(logits)[token] * math.log(frequency), 10),
    }[rule]()


def settled_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits of the step before, nearly the same at every third position."""
    previous = random_logits(*logits.shape, seed=9)
    previous[:, ::3] = logits[:, ::3] + 0.01 * previous[:, ::3]
    return previous


def check_candidates(scheduler, seeds, rule, count, temperatures, later_noise):
    """Positions and tokens of every candidate, recomputed from the uniform numbers of each sample's generator."""
    tokens, logits = state(), random_logits(BATCH, LENGTH, MASK, seed=1)
    previous = settled_logits(logits)
    timestep = scheduler.timesteps[1]
    memory = Memory(state={"logits": previous, "masked": tokens == MASK})
    proposal = scheduler.propose(logits, timestep, tokens, generator=generators(*seeds), memory=memory, grid=GRID)
    num = proposal.candidates.shape[1]
    uniforms = draw_uniforms(generators(*seeds), BATCH, num, LENGTH).tolist()
    for b in range(BATCH):
        for n in range(num):
            scores, drawn = {}, {}
            for position in (tokens[b] == MASK).nonzero()[:, 0].tolist():
                row, u_token, u_position = logits[b, position].tolist(), *(u[position] for u in uniforms[b][n])
                at = scheduler.position_temperatures[1].item() if rule == "titok" else scheduler.config.token_temperature
                drawn[position] = plain_token(row, u_token, at)
                before = previous[b, position].tolist()
                noise = scheduler.position_temperatures[1].item() if rule == "titok" else temperatures
                phi = plain_phi(rule, position, row, before, drawn[position], u_position, noise)
                scores[position] = phi / temperatures + plain_gumbel(u_position) if n > 0 and later_noise else phi
            if rule == "pivot":
                noise = {i: temperatures * plain_gumbel(uniforms[b][n][1][i]) if n > 0 else 0 for i in scores}
                scores[max(scores, key=lambda i: noise[i] - scores[i])] = math.inf
            chosen = top_positions(scores, count)
            assert set(proposal.selected[b, n].nonzero()[:, 0].tolist()) == chosen
            expected = [drawn[i] if i in chosen else token for i, token in enumerate(tokens[b].tolist())]
            assert proposal.candidates[b, n].tolist() == expected


@pytest.mark.parametrize("rule", CERTAINTIES)
@pytest.mark.parametrize("token_temperature", [0, 0.7])
def test_greedy_rule_decodes_the_positions_with_the_largest_phi(rule, token_temperature):
    scheduler = make_scheduler(MASK, STEPS, 0.6, sampler=rule, tokens_per_step=3, token_temperature=token_temperature)
    check_candidates(scheduler, (1, 2, 3), rule, 3, 0.6, later_noise=False)


@pytest.mark.parametrize("rule", CERTAINTIES)
@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_candidate_zero_is_greedy_and_the_others_draw_positions_with_gumbel_noise(rule, temperature):
    settings = {"sampler": "info_gain", "certainty": rule, "num_candidates": 4, "tokens_per_step": 2}
    scheduler = make_scheduler(MASK, STEPS, temperature, **settings)
    check_candidates(scheduler, (4, 5, 6), rule, 2, temperature, later_noise=rule in (*DETERMINISTIC, "pc_sampler"))


@pytest.mark.parametrize("rule", SAME_POSITIONS)
def test_position_temperature_zero_leaves_only_the_tokens_to_differ(rule):
    scheduler = make_scheduler(MASK, STEPS, 0, certainty=rule)
    proposal = scheduler.propose(random_logits(BATCH, LENGTH, MASK), 3, state(), generator=generators(1, 2, 3), grid=GRID)
    assert (proposal.selected == proposal.selected[:, :1]).all()
    assert (proposal.candidates != proposal.candidates[:, :1]).any()


@pytest.mark.parametrize("sampler", ["info_gain", "lookum"])
@pytest.mark.parametrize("rule", CERTAINTIES)
def test_one_candidate_is_the_greedy_rule_draw_for_draw(sampler, rule):
    runs = []
    for config in ({"sampler": sampler, "certainty": rule, "num_candidates": 1}, {"sampler": rule}):
        scheduler, tokens, memory = make_scheduler(MASK, STEPS, **config), state(), None
        own, run = generators(7, 8, 9), [state()]
        for index, timestep in enumerate(scheduler.timesteps):
            logits = random_logits(BATCH, LENGTH, MASK, seed=index // 2)
            proposal = scheduler.propose(logits, timestep, tokens, generator=own, memory=memory, grid=GRID)
            tokens, memory = scheduler.select(None, timestep, proposal).prev_sample, proposal.memory
            run.append(tokens)
        runs.append(torch.stack(run))
    assert torch.equal(*runs)
    assert (runs[0][-1] != MASK).all()
    eight = make_scheduler(MASK, STEPS, sampler=sampler, certainty=rule)
    proposal = eight.propose(random_logits(BATCH, LENGTH, MASK), 4, state(), generator=generators(7, 8, 9), grid=GRID)
    assert torch.equal(proposal.candidates[:, 0], runs[0][1])


def threshold_of(sampler: str, threshold: float | None) -> dict[str, float | None]:
    """The setting that is this sampler's threshold."""
    if sampler == "ancestral":
        return {}
    if sampler in PARALLEL_SAMPLERS:
        return {} if threshold is None else {"parallel_threshold": threshold}
    return {"confidence_threshold": threshold}


def allowed_part() -> torch.Tensor:
    allowed = torch.ones(BATCH, LENGTH).bool()
    allowed[:, 8:] = False
    return allowed


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([("info_gain", "mean"), ("info_gain", "sum"), ("info_gain", "kl"), ("lookum", "mean"), ("lookum", "sum")]),
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.booleans(),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 1.5]),
)
def test_select_equals_a_brute_force_evaluation(seed, rule, weight, block, threshold, bound):
    sampler, reduction = rule
    config = {"sampler": sampler, "gain_reduction": reduction, "gain_weight": weight, "confidence_threshold": threshold}
    scheduler = make_scheduler(MASK, STEPS, 0.4, certainty="margin", num_candidates=5, entropy_bound=bound, **config)
    logits, tokens = random_logits(BATCH, LENGTH, MASK, seed=seed), state(seed)
    allowed = allowed_part() if block else torch.ones(BATCH, LENGTH).bool()
    proposal = scheduler.propose(logits, 3, tokens, allowed, generator=generators(seed, 1, 2))
    lookahead = random_logits(BATCH, 5, LENGTH, MASK, seed=seed + 1)
    output = scheduler.select(lookahead, 3, proposal)
    for b in range(BATCH):
        masked = (tokens[b] == MASK) & allowed[b]
        objectives = []
        for n in range(5):
            first = proposal.candidates[b].tolist().index(proposal.candidates[b, n].tolist())
            next_masked = (proposal.candidates[b, n] == MASK) & allowed[b]
            cost, gain = plain_evaluation(logits[b], masked, lookahead[b, first], next_masked, reduction)
            objectives.append(weight * gain - cost)
            if sampler == "lookum":
                objectives[-1] = gain - plain_evaluation(logits[b], masked, None, masked, reduction)[1]
            assert output.cost[b, n].item() == pytest.approx(cost, abs=2e-5)
            assert output.gain[b, n].item() == pytest.approx(gain, abs=2e-5)
            assert output.objective[b, n].item() == pytest.approx(objectives[-1], abs=1e-4)
        winner = int(output.winner[b])
        assert objectives[winner] >= max(objectives) - 1e-4
        assert torch.equal(output.prev_sample[b], proposal.candidates[b, winner])
        assert torch.equal(output.pred_logits[b], lookahead[b, winner])


def test_on_average_over_the_tokens_kl_and_the_fall_of_entropy_are_the_mutual_information():
    joint = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    joint /= joint.sum()
    first, second = joint.sum(1), joint.sum(0)
    conditional = joint / first[:, None]
    scheduler = {
        name: make_scheduler(4, 2, 0.0, gain_reduction=name, tokens_per_step=1, num_candidates=2) for name in ("sum", "kl")
    }
    logits = torch.full((1, 2, 4), -torch.inf)
    logits[0, 0, :3], logits[0, 1] = first.log(), second.log()
    expected = {"sum": 0.0, "kl": 0.0}
    for token, weight in enumerate(first.tolist()):
        for name, one in scheduler.items():
            proposal = one.propose(logits, 1, torch.full((1, 2), 4), generator=generators(0))
            proposal.selected[:] = torch.tensor([True, False])
            proposal.candidates[:] = torch.tensor([token, 4])
            proposal.cost[:] = -(first * first.log()).sum()
            proposal.duplicate_of[:] = 0
            after = torch.zeros(1, 2, 2, 4)
            after[..., 1, :] = conditional[token].log()
            expected[name] += weight * one.select(after, 1, proposal).objective[0, 0].item()
    information = (joint * (joint / first[:, None] / second).log()).sum().item()
    assert expected == pytest.approx({"sum": information, "kl": information}, abs=1e-6)


@pytest.mark.parametrize("num_candidates", [3, 5, 8])
@pytest.mark.parametrize("sampler", ["info_gain", "lookum"])
def test_of_equal_candidates_only_the_first_is_read_and_wins(sampler, num_candidates):
    config = {"certainty": "confidence", "tokens_per_step": 5, "token_temperature": 0.3, "num_candidates": num_candidates}
    scheduler, repeated = make_scheduler(MASK, STEPS, 0.0, sampler=sampler, **config), 0
    for seed in range(30):
        logits = random_logits(BATCH, LENGTH, MASK, seed=seed, scale=3)
        proposal = scheduler.propose(logits, 4, state(seed), generator=generators(seed, 2, 3))
        states = [{tuple(row) for row in sample} for sample in proposal.candidates.tolist()]
        left = proposal.next_masked.any(-1).any(-1)
        assert proposal.distinct.sum(-1)[left].tolist() == [len(states[b]) for b in left.nonzero()[:, 0].tolist()]
        # the same positions cost the same, to the last bit, whatever the tokens: at temperature 0 all have the same positions
        assert torch.equal(proposal.cost, proposal.cost[:, :1].expand_as(proposal.cost))
        lookahead = random_logits(BATCH, num_candidates, LENGTH, MASK, seed=seed)
        lookahead[~proposal.distinct] = math.nan
        output = scheduler.select(lookahead, 4, proposal)
        assert output.objective.isfinite().all()
        assert torch.equal(output.objective, output.objective.gather(1, proposal.duplicate_of))
        assert output.pred_logits[left].isfinite().all()
        repeated += int((~proposal.distinct[left]).sum())
    assert repeated > 10


@pytest.mark.parametrize("bound", [1e-9, 0.5, 2.0, 1e9])
def test_entropy_bound_decodes_the_most_positions_that_the_bound_allows(bound):
    scheduler = make_scheduler(MASK, STEPS, sampler="entropy_bound", entropy_bound=bound)
    logits, tokens = random_logits(BATCH, LENGTH, MASK, scale=3), state()
    proposal = scheduler.propose(logits, 3, tokens, generator=generators(1, 2, 3))
    for b in range(BATCH):
        order = sorted((plain_entropy(logits[b, i].tolist()), i) for i in (tokens[b] == MASK).nonzero()[:, 0].tolist())
        count = max(k for k in range(1, len(order) + 1) if math.fsum(h for h, _ in order[: k - 1]) <= bound)
        assert proposal.num_decoded[b].tolist() == [count]
        assert set(proposal.selected[b, 0].nonzero()[:, 0].tolist()) == {i for _, i in order[:count]}
    last = scheduler.propose(logits, 0, tokens, generator=generators(1, 2, 3))
    assert torch.equal(last.selected[:, 0], tokens == MASK)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CERTAINTIES), st.floats(0, 6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_an_entropy_bound_decodes_more_than_the_schedule_while_the_joint_entropy_is_nearly_the_sum(rule, bound, num, index, seed):
    config = {"sampler": "info_gain", "certainty": rule, "num_candidates": num}
    plain, bounded = make_scheduler(MASK, STEPS, **config), make_scheduler(MASK, STEPS, **config, entropy_bound=bound)
    logits, tokens = random_logits(BATCH, LENGTH, MASK, seed=seed, scale=3), state(seed)
    initial_masks = (tokens == MASK).sum(-1)
    timestep = plain.timesteps[index]
    proposals = [
        one.propose(logits, timestep, tokens, generator=generators(1, 2, 3), initial_masks=initial_masks, grid=GRID)
        for one in (plain, bounded)
    ]
    assert (proposals[1].num_decoded >= proposals[0].num_decoded).all()
    for b in range(BATCH):
        masked = set((tokens[b] == MASK).nonzero()[:, 0].tolist())
        for n in range(num):
            chosen = set(proposals[1].selected[b, n].nonzero()[:, 0].tolist())
            assert chosen <= masked
            if len(chosen) > proposals[0].num_decoded[b, n]:
                entropies = [plain_entropy(logits[b, i].tolist()) for i in chosen]
                assert math.fsum(entropies) - max(entropies) <= bound + 1e-5
    if rule != "maskgit":  # whose noise is annealed further where tokens run ahead of the steps
        assert (proposals[1].selected | ~proposals[0].selected).all()


def test_the_pivot_is_the_most_uncertain_position_and_comes_with_the_most_certain_ones():
    scheduler = make_scheduler(MASK, STEPS, sampler="pivot", entropy_bound=0.6)
    logits, tokens = random_logits(BATCH, LENGTH, MASK, scale=6), state()
    proposal = scheduler.propose(logits, 4, tokens, generator=generators(1, 2, 3), initial_masks=(tokens == MASK).sum(-1))
    for b in range(BATCH):
        ascending = sorted((plain_entropy(logits[b, i].tolist()), i) for i in (tokens[b] == MASK).nonzero()[:, 0].tolist())
        count = max(k for k in range(len(ascending)) if math.fsum(h for h, _ in ascending[:k]) <= 0.6)
        expected = {i for _, i in ascending[:count]} | {ascending[-1][1]}
        assert set(proposal.selected[b, 0].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize(("temperature", "left", "expected"), [((2, 0), 0.5, 1.0), ((2, 0), 1.0, 1.5), ((0, 2), 0.25, 1.5)])
def test_with_a_bound_the_temperature_is_annealed_over_steps_or_tokens_whichever_is_further(temperature, left, expected):
    # The second of five steps: by the steps alone 1.5 of (2, 0), or 0.5 of (0, 2).
    scheduler = make_scheduler(MASK, STEPS, sampler="maskgit", entropy_bound=1e-9)
    scheduler.set_timesteps(STEPS, temperature=temperature)
    logits, tokens = random_logits(1, LENGTH, MASK, seed=1), state()[:1]
    masks = int((tokens == MASK).sum())
    uniforms = draw_uniforms(generators(1), 1, 1, LENGTH)[0, 0].tolist()
    initial = torch.tensor([round(masks / left)])
    proposal = scheduler.propose(logits, scheduler.timesteps[1], tokens, generator=generators(1), initial_masks=initial)
    scores = {}
    for i in (tokens[0] == MASK).nonzero()[:, 0].tolist():
        token = plain_token(logits[0, i].tolist(), uniforms[0][i], 1.0)
        scores[i] = math.log(probabilities(logits[0, i].tolist())[token]) + expected * plain_gumbel(uniforms[1][i])
    count = int(proposal.num_decoded[0, 0])
    assert set(proposal.selected[0, 0].nonzero()[:, 0].tolist()) == top_positions(scores, count)
    plain = make_scheduler(MASK, STEPS, sampler="maskgit")
    plain.set_timesteps(STEPS, temperature=temperature)
    assert temperature_at(plain.position_temperatures, 1, None).item() == plain.position_temperatures[1].item()
    ahead = temperature_at(plain.position_temperatures, 1, torch.tensor([left]))
    assert ahead.tolist() == pytest.approx([expected])


def sure_logits(sure: int) -> torch.Tensor:
    """The first `sure` masked positions of sample 0 (from 2 on) have a probability above 0.9, the others below 0.6."""
    logits = random_logits(BATCH, LENGTH, MASK, scale=0.3)
    for index in range(sure):
        logits[0, 2 + index] = 0
        logits[0, 2 + index, index] = 6 + 0.1 * index
    return logits


@pytest.mark.parametrize("sure", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("certainty", CERTAINTIES)
def test_confident_positions_are_in_every_candidate_with_their_most_probable_token(sure, certainty):
    config = {"tokens_per_step": 3, "confidence_threshold": 0.9, "certainty": certainty, "token_temperature": 5.0}
    scheduler = make_scheduler(MASK, STEPS, **config)
    tokens = torch.full((BATCH, LENGTH), MASK)
    tokens[:, :2] = 0
    logits = sure_logits(sure)
    certain = range(2 + sure)[::-1][: min(3, sure)]  # the most confident come last
    proposal = scheduler.propose(logits, 4, tokens, generator=generators(1, 2, 3), grid=GRID)
    assert proposal.selected.sum(-1).eq(3).all()
    for position in certain:
        assert proposal.selected[0, :, position].all()
        assert proposal.candidates[0, :, position].eq(position - 2).all()
    if sure < 3:
        assert proposal.duplicate_of[0].any()
    assert proposal.needs_lookahead  # for the other samples
    alone = scheduler.propose(logits[:1], 4, tokens[:1], generator=generators(1), grid=GRID)
    assert torch.equal(alone.candidates, proposal.candidates[:1])
    assert alone.needs_lookahead == (sure < 3)
    if sure >= 3:
        output = scheduler.select(None, 4, alone)
        assert output.pred_logits is None
        assert output.gain.isnan().all()
        assert output.cost[0, 0].item() == pytest.approx(sum(plain_entropy(logits[0, i].tolist()) for i in certain), abs=1e-5)


def test_threshold_is_exclusive_and_compares_the_largest_probability():
    tokens, logits = torch.full((1, 4), MASK), torch.zeros(1, 4, 2)
    logits[0, 2, 1] = 1.0
    for threshold, bypass in ((0.5, True), (0.8, False)):
        scheduler = make_scheduler(MASK, STEPS, tokens_per_step=1, confidence_threshold=threshold, certainty="uniform")
        proposal = scheduler.propose(logits, 4, tokens, generator=generators(3))
        assert proposal.needs_lookahead != bypass
        assert proposal.selected[0, :, 2].all() == bypass


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(list(SAMPLERS)),
    st.integers(0, STEPS - 1),
    st.sampled_from([None, 0.3]),
    st.floats(0, 1),
)
def test_known_tokens_and_positions_not_allowed_stay(seed, sampler, timestep, threshold, share):
    scheduler = make_scheduler(MASK, STEPS, sampler=sampler, **threshold_of(sampler, threshold))
    tokens, allowed = state(seed, share), allowed_part()
    logits = random_logits(BATCH, LENGTH, MASK, seed=seed)
    proposal = scheduler.propose(logits, timestep, tokens, allowed, generator=generators(seed, 1, 2), grid=GRID)
    masked = (tokens == MASK) & allowed
    keep = ~masked[:, None].expand_as(proposal.candidates)
    assert torch.equal(proposal.candidates[keep], tokens[:, None].expand_as(proposal.candidates)[keep])
    assert torch.equal(proposal.masked, masked)
    assert torch.equal(proposal.selected.sum(-1), proposal.num_decoded)
    assert not proposal.entropies[~masked].any()
    torch.testing.assert_close(proposal.entropies[masked], entropy(logits[masked]))
    if SAMPLERS[sampler].paced:
        assert (proposal.num_decoded >= masked.any(-1).long()[:, None]).all()
    if timestep == 0:
        assert torch.equal(proposal.num_decoded, masked.sum(-1)[:, None].expand(proposal.num_decoded.shape))


@pytest.mark.parametrize("token_temperature", [0, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mask_token_inside_the_vocabulary_is_never_sampled_and_not_in_the_entropies(sampler, token_temperature):
    mask = 3
    scheduler = make_scheduler(mask, STEPS, sampler=sampler, token_temperature=token_temperature, **threshold_of(sampler, 0.6))
    tokens = torch.full((2, LENGTH), mask)
    logits, lookahead = random_logits(2, LENGTH, 6), random_logits(2, 8, LENGTH, 6, seed=1)
    logits[..., mask], lookahead[..., mask] = 30.0, 20.0
    others = [0, 1, 2, 4, 5]
    proposal = scheduler.propose(logits, 1, tokens, generator=generators(1, 2), grid=GRID)
    assert (proposal.candidates != mask).sum(-1).eq(proposal.num_decoded).all()
    torch.testing.assert_close(proposal.entropies, entropy(logits[..., others]))
    assert proposal.needs_lookahead == scheduler.looks_ahead
    if proposal.needs_lookahead:
        output = scheduler.select(lookahead, 1, proposal)
        without = lookahead.clone()
        without[..., mask] = -math.inf
        torch.testing.assert_close(output.objective, scheduler.select(without, 1, proposal).objective)


def test_klass_compares_distributions_without_the_mask_token():
    """Position 1 has not changed but for the mask token's share, position 0 is more confident and has changed."""
    mask = 3
    scheduler = make_scheduler(mask, STEPS, sampler="klass", tokens_per_step=1)
    now = torch.tensor([[[2.0, 0.0, 0.0, -9.0], [1.0, 0.0, 0.0, 5.0]]])
    before = torch.tensor([[[0.0, 0.0, 2.0, -9.0], [1.0, 0.0, 0.0, 7.0]]])
    memory = Memory(state={"logits": before, "masked": torch.ones(1, 2).bool()})
    proposal = scheduler.propose(now, 3, torch.full((1, 2), mask), generator=generators(1), memory=memory)
    assert proposal.selected[0, 0].tolist() == [False, True]


def test_tokens_come_from_top_k_and_top_p_but_scores_from_the_whole_distribution():
    logits = random_logits(BATCH, LENGTH, MASK)
    tokens = torch.full((BATCH, LENGTH), MASK)
    for config in ({"top_k": 2}, {"top_p": 0.5}):
        scheduler = make_scheduler(MASK, 1, sampler="confidence", token_temperature=2.0, **config)
        proposal = scheduler.propose(logits, 0, tokens, generator=generators(1, 2, 3))
        rank = (logits > logits.gather(-1, proposal.candidates[:, 0, :, None])).sum(-1)
        assert 0 < rank.max() < (2 if "top_k" in config else 4)
        torch.testing.assert_close(proposal.cost[:, 0], entropy(logits).sum(-1))


def test_a_pair_of_token_temperatures_makes_the_factor_on_the_logits_linear():
    scheduler, logits = make_scheduler(MASK, 5, sampler="halton", token_temperature=(1.0, 0.5)), random_logits(1, 9, 6)
    for index, factor in enumerate((1.0, 1.25, 1.5, 1.75, 2.0)):
        single = make_scheduler(MASK, 5, sampler="halton", token_temperature=1 / factor)
        tokens = torch.full((1, 9), MASK)
        proposals = [one.propose(logits, 4 - index, tokens, generator=generators(index)) for one in (scheduler, single)]
        assert torch.equal(proposals[0].candidates, proposals[1].candidates)
    assert annealed_inversely((1.0, 0.5), 0, 1) == 1.0


def test_a_randomized_halton_order_goes_round_from_a_place_of_each_samples_own():
    order = halton_order(3, 3).argsort().tolist()
    options = {"sampler": "halton", "tokens_per_step": 1, "halton_randomize": True}
    starts = set()
    for seed in range(12):
        scheduler = make_scheduler(MASK, 9, **options)
        model = HashModel(9, 6, conditions=(0, 0))
        trace = decode(model, scheduler, torch.full((2, 9), MASK), generator=generators(seed, 100)).trace
        alone = decode(
            HashModel(9, 6), make_scheduler(MASK, 9, **options), torch.full((1, 9), MASK), generator=generators(seed)
        ).trace
        assert torch.equal(trace.decoded_at[0], alone.decoded_at[0])
        decoded = trace.decoded_at[0].argsort().tolist()
        start = order.index(decoded[0])
        assert decoded == order[start:] + order[:start]
        starts.add(start)
    assert len(starts) > 3


def test_the_order_starts_at_its_beginning_where_it_is_not_randomized():
    trace = decode(HashModel(9, 6), make_scheduler(MASK, 9, sampler="halton", tokens_per_step=1), torch.full((1, 9), MASK)).trace
    assert trace.decoded_at[0].argsort().tolist() == halton_order(3, 3).argsort().tolist()


@pytest.mark.parametrize("at_once", [1, 7 * 40, 7 * 100])
@pytest.mark.parametrize(
    "config",
    [
        {"gain_reduction": "kl"},
        {"gain_reduction": "sum", "top_p": 0.8},
        {"sampler": "lookum", "certainty": "maskgit"},
        {"sampler": "klass", "confidence_threshold": 0.5},
    ],
    ids=str,
)
def test_logits_are_read_alike_together_and_in_parts(config, at_once, monkeypatch):
    scheduler = make_scheduler(MASK, STEPS, **{"sampler": "info_gain", "certainty": "uniform", **config})
    before = random_logits(BATCH, LENGTH, MASK, seed=1)
    after = random_logits(BATCH, 8, LENGTH, MASK, seed=2)

    def step():
        proposal = scheduler.propose(before, 3, state(1), generator=generators(1, 2, 3))
        return proposal, scheduler.select(after if proposal.needs_lookahead else None, 3, proposal)

    sizes, read = [], reductions.Reader.read
    monkeypatch.setattr(reductions.Reader, "read", lambda *where: (rows := read(*where), sizes.append(len(rows)))[0])
    whole_proposal, whole = step()
    num_reads = len(sizes)
    sizes.clear()
    monkeypatch.setattr(reductions, "CPU_BLOCK", at_once)
    proposal, parts = step()
    assert max(sizes) <= max(at_once // MASK, 1)
    assert len(sizes) > num_reads or at_once // MASK >= proposal.masked.sum()
    assert torch.equal(proposal.candidates, whole_proposal.candidates)
    assert torch.equal(proposal.cost, whole_proposal.cost)
    assert torch.equal(parts.objective.nan_to_num(7), whole.objective.nan_to_num(7))


@pytest.mark.parametrize("at_once", [1, 7 * 100])
@pytest.mark.parametrize("reduction", ["sum", "kl"])
def test_an_error_names_the_candidate_whose_logits_are_not_finite(reduction, at_once, monkeypatch):
    monkeypatch.setattr(reductions, "CPU_BLOCK", at_once)
    scheduler = make_scheduler(MASK, STEPS, sampler="info_gain", certainty="uniform", gain_reduction=reduction)
    proposal = scheduler.propose(random_logits(BATCH, LENGTH, MASK, seed=1), 3, state(1), generator=generators(1, 2, 3))
    after = random_logits(BATCH, 8, LENGTH, MASK, seed=2)
    last = int(proposal.distinct[1].nonzero()[-1])  # of the candidates whose logits are read
    assert last > 0
    after[1, last, state(1)[1] == MASK] = math.nan
    with pytest.raises(ValueError, match=f"sample 1, candidate {last}, position"):
        scheduler.select(after, 3, proposal)


@pytest.mark.parametrize("size", [9, 1500])
def test_logits_of_a_model_that_is_being_trained_are_read_without_their_graph(size):
    scheduler = make_scheduler(size, 3, num_candidates=3, gain_reduction="kl", lazy_threshold=None)
    logits, after = (random_logits(1, *shape, size).requires_grad_() for shape in ((6,), (3, 6)))
    proposal = scheduler.propose(logits, 2, torch.full((1, 6), size), generator=generators(1))
    assert proposal.needs_lookahead
    assert not proposal.cost.requires_grad
    assert not scheduler.select(after, 2, proposal).objective.requires_grad
