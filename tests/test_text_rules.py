"""The rules that come from text models: left, pc_sampler and the parallel ones."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.reference import plain_entropy, plain_kl, plain_token, probabilities, top_positions
from helpers.sampling import HashModel, generators, make_scheduler, partly_known, plain_frequencies, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from diffusers_infogain import decode
from diffusers_infogain.candidates import draw_uniforms
from diffusers_infogain.token_frequencies import save_token_frequencies, token_frequencies

MASK, BATCH, LENGTH, STEPS = 7, 3, 12, 5
PARALLEL_SAMPLERS = ("confidence_parallel", "klass_parallel", "factor_parallel", "frechet_parallel")
TEXT_RULES = ("left", "pc_sampler", *PARALLEL_SAMPLERS)


def state(seed: int = 0, share: float = 0.7) -> torch.Tensor:
    return partly_known(BATCH, LENGTH, MASK, seed, share)


# pc_sampler


@pytest.mark.parametrize(("decay", "clip"), [(0, 10.0), (0.25, 0.5), (1.0, 3), (2, 0)])
@pytest.mark.parametrize("block", [slice(0, 12), slice(4, 10)])
def test_pc_sampler_counts_positions_of_the_active_region_and_clips_the_confidence(decay, clip, block):
    scheduler = make_scheduler(MASK, STEPS, sampler="pc_sampler", tokens_per_step=2, pc_decay=decay, pc_clip=clip)
    logits, tokens, allowed = random_logits(BATCH, LENGTH, MASK, seed=3), state(3), torch.zeros(BATCH, LENGTH).bool()
    allowed[:, block] = True
    proposal = scheduler.propose(logits, 4, tokens, allowed, generator=generators(1, 2, 3))
    uniforms = draw_uniforms(generators(1, 2, 3), BATCH, 1, LENGTH).tolist()
    positive = [f for f in plain_frequencies() if f > 0]
    for b in range(BATCH):
        scores = {}
        for place, position in enumerate(range(LENGTH)[block]):
            row = logits[b, position].tolist()
            token = plain_token(row, uniforms[b][0][0][position], 1.0)
            calibrated = -probabilities(row)[token] * math.log(plain_frequencies()[token] or min(positive))
            if tokens[b, position] == MASK:
                scores[position] = math.exp(-decay * place) * min(calibrated, clip)
        assert set(proposal.selected[b, 0].nonzero()[:, 0].tolist()) == top_positions(scores, 2)


def test_pc_sampler_decodes_a_block_far_into_a_text_as_one_at_its_beginning():
    scheduler = make_scheduler(MASK, LENGTH, sampler="pc_sampler", tokens_per_step=2, token_temperature=0, pc_decay=0.1)
    for seed in range(10):
        logits, far = random_logits(1, LENGTH, MASK, seed=seed), torch.zeros(1, 2000 + LENGTH, MASK)
        far[:, 2000:] = logits
        tokens, allowed = torch.full((1, 2000 + LENGTH), MASK), torch.zeros(1, 2000 + LENGTH).bool()
        allowed[:, 2000:] = True
        here = scheduler.propose(logits, LENGTH - 1, tokens[:, 2000:], generator=generators(0))
        there = scheduler.propose(far, LENGTH - 1, tokens, allowed, generator=generators(0))
        assert torch.equal(there.selected[..., 2000:], here.selected)


def test_pc_sampler_reads_its_file_once_and_keeps_no_more_than_the_path_in_its_configuration(tmp_path):
    path = tmp_path / "frequencies.safetensors"
    save_token_frequencies(token_frequencies([[0, 1, 1], [3]], 5), path)
    config = {"sampler": "pc_sampler", "pc_frequencies": str(path), "pc_decay": 0.0}
    schedulers = {count: make_scheduler(4, 4, tokens_per_step=count, **config) for count in (1, 3)}
    path.unlink()
    tokens, logits = torch.full((1, 4), 4), torch.full((1, 4, 4), -math.inf)
    logits[0, range(4), range(4)] = 0.0  # surely the tokens 0, 1, 2, 3, of frequency 1/4, 1/2, 0 (as 1/4), 1/4
    for count, expected in ((1, [True, False, False, False]), (3, [True, False, True, True])):
        schedulers[count].set_timesteps(4)
        assert schedulers[count].config.pc_frequencies == str(path)
        assert schedulers[count].propose(logits, 3, tokens).selected[0, 0].tolist() == expected


def test_pc_sampler_without_frequencies_says_how_to_build_them():
    for config in ({"sampler": "pc_sampler"}, {"sampler": "info_gain", "certainty": "pc_sampler"}):
        with pytest.raises(ValueError, match=r"`pc_frequencies` must be the path.*got None: build one with `token_frequencies`"):
            make_scheduler(MASK, STEPS, **config, pc_frequencies=None)


def test_frequencies_that_do_not_fit_are_an_error(tmp_path):
    path = str(tmp_path / "f.safetensors")
    for tensors, message in (
        ({"counts": torch.ones(3)}, 'float32 tensor "frequencies" of shape (V,), got none in \''),
        ({"frequencies": torch.ones(3).double()}, "got torch.float64 (3,)"),
        ({"frequencies": torch.ones(3, 1)}, "got torch.float32 (3, 1)"),
        ({"frequencies": torch.zeros(3)}, "numbers in [0, 1], not all of them 0"),
        ({"frequencies": torch.tensor([0.5, math.nan])}, "numbers in [0, 1]"),
        ({"frequencies": torch.tensor([3.0, 0.5])}, "numbers in [0, 1]"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"`pc_frequencies` must hold.*" + re.escape(message)):
            make_scheduler(MASK, STEPS, sampler="pc_sampler", pc_frequencies=path)
    Path(path).write_text("not tensors")
    with pytest.raises(ValueError, match="`pc_frequencies` must be the path of a safetensors file"):
        make_scheduler(MASK, STEPS, sampler="pc_sampler", pc_frequencies=path)
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        make_scheduler(MASK, STEPS, sampler="pc_sampler", pc_frequencies=str(tmp_path / "missing.safetensors"))
    save_token_frequencies(torch.full((MASK - 1,), 0.1), path)
    scheduler = make_scheduler(MASK, STEPS, sampler="pc_sampler", pc_frequencies=path)
    with pytest.raises(ValueError, match="`pc_frequencies` must hold a number for each of the model's 7 tokens, got 6"):
        scheduler.propose(random_logits(1, 4, MASK), 3, torch.full((1, 4), MASK))


# left


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0, 0.5, 2.0, 5.0]), st.sampled_from([slice(0, 12), slice(3, 10)]))
def test_left_writes_on_in_the_region_while_the_bound_lasts(seed, bound, block):
    scheduler = make_scheduler(MASK, LENGTH, sampler="left", tokens_per_step=1, entropy_bound=bound)
    logits, tokens, allowed = random_logits(BATCH, LENGTH, MASK, seed=seed), state(seed), torch.zeros(BATCH, LENGTH).bool()
    allowed[:, block] = True
    proposal = scheduler.propose(logits, LENGTH - 1, tokens, allowed, generator=generators(1, 2, 3))
    for b in range(BATCH):
        masked = [i for i in range(LENGTH)[block] if tokens[b, i] == MASK]
        entropies = [plain_entropy(logits[b, i].tolist()) for i in masked]
        counts = [n for n in range(1, len(masked) + 1) if n == 1 or sum(entropies[:n]) - max(entropies[:n]) <= bound]
        assert proposal.selected[b, 0].nonzero()[:, 0].tolist() == masked[: max(counts, default=0)]


# confidence_parallel, klass_parallel, factor_parallel and frechet_parallel


def plain_parallel(confidences: dict[int, float], ready: set[int], count: int) -> set[int]:
    """All that are ready; where the schedule asks for more, the most confident of the others as well."""
    others = {i: value for i, value in confidences.items() if i not in ready}
    return ready | top_positions(others, max(count - len(ready), 0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), st.integers(1, 6), st.sampled_from([0, 0.7]))
def test_confidence_parallel_decodes_every_position_above_the_threshold(seed, threshold, per_step, token_temperature):
    config = {"parallel_threshold": threshold, "tokens_per_step": per_step, "token_temperature": token_temperature}
    scheduler = make_scheduler(MASK, LENGTH, sampler="confidence_parallel", **config)
    logits, tokens = random_logits(BATCH, LENGTH, MASK, seed=seed, scale=4), state(seed)
    proposal = scheduler.propose(logits, LENGTH - 1, tokens, generator=generators(1, 2, 3))
    uniforms = draw_uniforms(generators(1, 2, 3), BATCH, 1, LENGTH).tolist()
    assert not proposal.needs_lookahead
    for b in range(BATCH):
        masked = (tokens[b] == MASK).nonzero()[:, 0].tolist()
        confidences = {i: max(probabilities(logits[b, i].tolist())) for i in masked}
        ready = {i for i in masked if confidences[i] > threshold}
        chosen = set(proposal.selected[b, 0].nonzero()[:, 0].tolist())
        assert chosen == plain_parallel(confidences, ready, min(per_step, len(masked)))
        for i in chosen:
            drawn = plain_token(logits[b, i].tolist(), uniforms[b][0][0][i], token_temperature)
            assert proposal.candidates[b, 0, i] == drawn


def test_threshold_of_the_parallel_rules_is_exclusive():
    logits, tokens = torch.full((1, 3, 2), 0.0), torch.full((1, 3), MASK)
    logits[0, 1, 0] = -math.inf
    for threshold, expected in ((0.5, [False, True, False]), (0.4, [True, True, True]), (1.0, [False, True, False])):
        scheduler = make_scheduler(MASK, 3, sampler="confidence_parallel", tokens_per_step=1, parallel_threshold=threshold)
        assert scheduler.propose(logits, 2, tokens, generator=generators(0)).selected[0, 0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.3, 0.5]), st.booleans())
def test_klass_parallel_decodes_what_is_confident_and_has_settled_for_some_steps(seed, history, per_step, threshold, block):
    """Also with the counts handed on from step to step, and positions that settle and unsettle."""
    config = {"klass_history": history, "parallel_threshold": threshold, "klass_threshold": 0.05, "tokens_per_step": per_step}
    scheduler = make_scheduler(MASK, LENGTH, sampler="klass_parallel", **config)
    allowed = (torch.arange(LENGTH) < (8 if block else LENGTH)).expand(BATCH, LENGTH)
    tokens, past, memory, base = state(seed, 0.9), [], None, random_logits(BATCH, LENGTH, MASK, seed=seed)
    for index, timestep in enumerate(scheduler.timesteps):
        logits = base + 0.25 * random_logits(BATCH, LENGTH, 1, seed=seed + index, scale=1.0) * random_logits(BATCH, LENGTH, MASK)
        before = tokens
        proposal = scheduler.propose(logits, timestep, tokens, allowed, generator=generators(1, 2, 3), memory=memory)
        past.append(logits)
        tokens, memory = scheduler.select(None, timestep, proposal).prev_sample, proposal.memory
        for b in range(BATCH):
            masked = ((before[b] == MASK) & allowed[b]).nonzero()[:, 0].tolist()
            confidences = {i: max(probabilities(logits[b, i].tolist())) for i in masked}
            pairs = list(itertools.pairwise(past))[-history:]
            ready = {
                i
                for i in masked
                if confidences[i] > threshold
                and len(pairs) == history
                and all(plain_kl(now[b, i].tolist(), then[b, i].tolist()) < 0.05 for then, now in pairs)
            }
            count = len(masked) if index == LENGTH - 1 else min(per_step, len(masked))
            assert set(proposal.selected[b, 0].nonzero()[:, 0].tolist()) == plain_parallel(confidences, ready, count)
    assert ((tokens != MASK) | ~allowed).all()


def test_klass_parallel_in_the_loop_waits_for_its_history_and_then_decodes_all_that_qualify():
    """A model that says the same in every step: one token a step until the history is full, then the rest at once."""
    logits = random_logits(2, LENGTH, MASK, scale=1.0)
    tokens = torch.full((2, LENGTH), MASK)
    tokens[1, 5:] = 0
    config = {"tokens_per_step": 1, "parallel_threshold": 0.0, "token_temperature": 0}
    for history in (1, 2, 3):
        scheduler = make_scheduler(MASK, LENGTH, sampler="klass_parallel", klass_history=history, **config)
        trace = decode(lambda tokens, rows: logits[rows], scheduler, tokens).trace
        assert trace.num_decoded[:, 0].tolist() == [1] * history + [LENGTH - history]
        assert trace.num_decoded[:, 1].tolist() == [1] * history + [5 - history]

    def edit(step):
        return torch.where(torch.arange(LENGTH) == 0, 1 + step.index, step.tokens) if step.index == 1 else None

    scheduler = make_scheduler(MASK, LENGTH, sampler="klass_parallel", klass_history=2, **config)
    trace = decode(lambda tokens, rows: logits[rows], scheduler, tokens[:1], callback=edit).trace
    assert trace.num_decoded[:4, 0].tolist() == [1, 1, 1, 1]  # what had settled before the edit does not count


def plain_count(sampler: str, confidences: list[float], factor: float) -> int:
    """The largest n that the published rule accepts of confidences in falling order."""
    doubts = [1 - p for p in confidences]
    risks = {"factor_parallel": lambda n: (n + 1) * doubts[n - 1], "frechet_parallel": lambda n: sum(doubts[:n]) + doubts[n - 1]}
    return max((n for n in range(1, len(doubts) + 1) if risks[sampler](n) < factor), default=0)


def chosen_of(sampler: str, confidences: list[float], factor: float) -> list[bool]:
    """What a step decodes at these confidences of two tokens, if the schedule asks for one."""
    scheduler = make_scheduler(2, 9, sampler=sampler, tokens_per_step=1, parallel_factor=factor)
    logits = torch.tensor([[[p, 1 - p] for p in confidences]], dtype=torch.double).log()
    return scheduler.propose(logits, 8, torch.full((1, len(confidences)), 2), generator=generators(0)).selected[0, 0].tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.sampled_from(PARALLEL_SAMPLERS[2:]), st.sampled_from([0.0, 0.5, 1.0, 2.5]), st.integers(1, 4))
def test_factor_rules_decode_the_largest_set_that_the_published_formula_accepts(seed, sampler, factor, per_step):
    scheduler = make_scheduler(MASK, LENGTH, sampler=sampler, parallel_factor=factor, tokens_per_step=per_step)
    logits, tokens = random_logits(BATCH, LENGTH, MASK, seed=seed, scale=5), state(seed)
    allowed = (torch.arange(LENGTH) < 10).expand(BATCH, LENGTH)
    proposal = scheduler.propose(logits, LENGTH - 1, tokens, allowed, generator=generators(1, 2, 3))
    for b in range(BATCH):
        confidences = {i: max(probabilities(logits[b, i].tolist())) for i in range(10) if tokens[b, i] == MASK}
        count = max(plain_count(sampler, sorted(confidences.values(), reverse=True), factor), min(per_step, len(confidences)))
        assert set(proposal.selected[b, 0].nonzero()[:, 0].tolist()) == top_positions(confidences, count)


def test_factor_rules_on_the_example_of_the_paper_and_on_equal_confidences():
    """Figure 1 of arXiv 2606.02955: f = 0.7 accepts two tokens by the weakest one, and four by all of them."""
    confidences = [0.95, 0.74, 0.99, 0.78, 0.82]
    assert chosen_of("factor_parallel", confidences, 0.7) == [True, False, True, False, False]
    assert chosen_of("frechet_parallel", confidences, 0.7) == [True, False, True, True, True]
    for p in (0.79, 0.86, 0.93):
        for count in range(1, 9):
            factor = (count + 1.5) * (1 - p)
            assert [sum(chosen_of(sampler, [p] * 8, factor)) for sampler in PARALLEL_SAMPLERS[2:]] == [count, count]


@pytest.mark.parametrize("sampler", PARALLEL_SAMPLERS)
def test_a_parallel_rule_refuses_a_second_threshold_and_negative_factors(sampler):
    message = f"`confidence_threshold` must be None for the sampler '{sampler}', which has its own, got 0.5"
    with pytest.raises(ValueError, match=message):
        make_scheduler(MASK, STEPS, sampler=sampler, confidence_threshold=0.5)
    with pytest.raises(ValueError, match=r"`parallel_factor` must be a number >= 0, got -0\.1"):
        make_scheduler(MASK, STEPS, sampler=sampler, parallel_factor=-0.1)


@pytest.mark.parametrize("sampler", PARALLEL_SAMPLERS)
def test_parallel_rules_are_the_confidence_rule_where_nothing_qualifies(sampler):
    tokens = torch.full((2, LENGTH), MASK)
    runs = []
    for name in (sampler, "confidence"):
        model = HashModel(LENGTH, MASK, (1, 2))
        scheduler = make_scheduler(MASK, STEPS, sampler=name, parallel_threshold=1.0, parallel_factor=0.0)
        runs.append(decode(model, scheduler, tokens, generator=generators(1, 2)))
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert torch.equal(runs[0].trace.selected, runs[1].trace.selected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from(TEXT_RULES), st.sampled_from([0.0, 0.4, 0.9]), st.booleans())
def test_text_rules_leave_no_mask_and_a_sample_is_the_same_alone(seed, sampler, threshold, one_each):
    config = {
        "sampler": sampler,
        "parallel_threshold": threshold,
        "parallel_factor": 1 - threshold,
        "klass_threshold": 0.5,
        "klass_history": 1,
    }
    config["tokens_per_step"] = 1 if one_each else None
    scheduler, tokens = make_scheduler(MASK, LENGTH if one_each else 4, **config), state(seed)
    model = HashModel(LENGTH, MASK, (4, 5, 6), seed=seed, scale=1.0)
    together = decode(model, scheduler, tokens, generator=generators(1, 2, 3))
    assert (together.tokens != MASK).all()
    for b in range(BATCH):
        alone = HashModel(LENGTH, MASK, (4 + b,), seed=seed, scale=1.0)
        output = decode(alone, scheduler, tokens[b : b + 1], generator=generators(1 + b))
        assert torch.equal(output.tokens[0], together.tokens[b])
