"""Certainty of the distributions that tokens are drawn from, candidates that draw their positions, and ancestral sampling."""

import math

import pytest
import torch
from helpers.reference import chi_square, chi_square_bound, plain_entropy, plain_gumbel, plain_token, probabilities, top_positions
from helpers.sampling import generators, make_scheduler, partly_known, random_logits

from diffusers_infogain.candidates import draw_uniforms
from diffusers_infogain.schedules import release_probability

MASK, BATCH, LENGTH, STEPS = 7, 3, 12, 5


def state() -> torch.Tensor:
    return partly_known(BATCH, LENGTH, MASK, 0, 0.7)


def plain_filtered(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Logits after the temperature, -inf for tokens that are not drawn."""
    scaled = [value / (temperature or 1) for value in logits]
    order = sorted(range(len(scaled)), key=lambda v: -scaled[v])[:top_k]
    kept = [scaled[v] if v in order else -math.inf for v in range(len(scaled))]
    p, mass, inside = probabilities(kept), 0.0, set()
    for v in order:
        if mass < top_p:
            inside.add(v)
        mass += p[v]
    return [value if v in inside else -math.inf for v, value in enumerate(kept)]


@pytest.mark.parametrize("rule", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0, None, 1.0), (0, None, 0.6), (0.5, 3, 0.9), (2.0, None, 0.8)])
@pytest.mark.parametrize("num_candidates", [1, 3])
def test_phi_of_draws_is_that_of_the_distribution_that_tokens_are_drawn_from(rule, temperature, top_k, top_p, num_candidates):
    settings = {"certainty": rule, "certainty_of": "draws", "num_candidates": num_candidates, "tokens_per_step": 2}
    drawn = {"token_temperature": temperature, "top_k": top_k, "top_p": top_p}
    scheduler = make_scheduler(MASK, STEPS, 0, **settings, **drawn)
    tokens, logits = state(), random_logits(BATCH, LENGTH, MASK, seed=1)
    proposal = scheduler.propose(logits, 3, tokens, generator=generators(1, 2, 3))
    uniforms = draw_uniforms(generators(1, 2, 3), BATCH, num_candidates, LENGTH).tolist()
    for b in range(BATCH):
        for n in range(num_candidates):
            scores = {}
            for position in (tokens[b] == MASK).nonzero()[:, 0].tolist():
                kept = plain_filtered(logits[b, position].tolist(), temperature, top_k, top_p)
                p = sorted(probabilities(kept))
                token = plain_token(kept, uniforms[b][n][0][position], min(temperature, 1))
                scores[position] = {
                    "confidence": probabilities(kept)[token],
                    "entropy": -plain_entropy(kept),
                    "margin": p[-1] - p[-2],
                }[rule]
            chosen = set(proposal.selected[b, n].nonzero()[:, 0].tolist())
            assert sorted(scores[i] for i in chosen) == pytest.approx(
                sorted(scores[i] for i in top_positions(scores, 2)), abs=1e-6
            )
    entropies = [[plain_entropy(row) for row in sample] for sample in logits.tolist()]
    masked = tokens == MASK
    torch.testing.assert_close(proposal.entropies[masked], torch.tensor(entropies)[masked])  # costs stay the model's


def test_confidence_parallel_of_draws_decodes_what_is_drawn_with_more_than_the_threshold():
    scheduler = make_scheduler(
        MASK, LENGTH, sampler="confidence_parallel", certainty_of="draws", parallel_threshold=0.4, tokens_per_step=1, top_p=0.8
    )
    tokens, logits = state(), random_logits(BATCH, LENGTH, MASK, seed=2)
    proposal = scheduler.propose(logits, 4, tokens, generator=generators(1, 2, 3))
    uniforms = draw_uniforms(generators(1, 2, 3), BATCH, 1, LENGTH).tolist()
    for b in range(BATCH):
        found = {}
        for position in (tokens[b] == MASK).nonzero()[:, 0].tolist():
            kept = plain_filtered(logits[b, position].tolist(), 1.0, None, 0.8)
            found[position] = probabilities(kept)[plain_token(kept, uniforms[b][0][0][position], 1.0)]
        expected = {position for position, p in found.items() if p > 0.4} or {max(found, key=lambda position: found[position])}
        assert set(proposal.selected[b, 0].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_with_draw_first_all_candidates_draw_their_positions(num_candidates):
    settings = {"certainty": "confidence", "num_candidates": num_candidates, "tokens_per_step": 3, "draw_first": True}
    scheduler = make_scheduler(MASK, STEPS, 0.5, **settings)
    tokens, logits = state(), random_logits(BATCH, LENGTH, MASK, seed=3)
    proposal = scheduler.propose(logits, 3, tokens, generator=generators(1, 2, 3))
    uniforms = draw_uniforms(generators(1, 2, 3), BATCH, num_candidates, LENGTH).tolist()
    for b in range(BATCH):
        for n in range(num_candidates):
            positions = (tokens[b] == MASK).nonzero()[:, 0].tolist()
            scores = {i: max(probabilities(logits[b, i].tolist())) / 0.5 + plain_gumbel(uniforms[b][n][1][i]) for i in positions}
            assert set(proposal.selected[b, n].nonzero()[:, 0].tolist()) == top_positions(scores, 3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "dream"])
def test_ancestral_sampling_decodes_each_position_for_itself(schedule):
    samples, length, index = 4000, 3, 1
    scheduler = make_scheduler(MASK, STEPS, sampler="ancestral", masking_schedule=schedule)
    tokens = torch.full((samples, length), MASK)
    logits = random_logits(1, length, MASK).expand(samples, -1, -1)
    proposal = scheduler.propose(logits, STEPS - 1 - index, tokens, generator=torch.Generator().manual_seed(0))
    p = release_probability(index, STEPS, schedule, tokens_per_step=None, length=length)
    patterns = (proposal.selected[:, 0].long() * torch.tensor([4, 2, 1])).sum(-1)
    counts = patterns.bincount(minlength=8).tolist()
    expected = [samples * p**ones * (1 - p) ** (length - ones) for ones in (bin(pattern).count("1") for pattern in range(8))]
    assert chi_square(counts, expected) < chi_square_bound(8)
    last = scheduler.propose(logits, 0, tokens, generator=torch.Generator().manual_seed(0))
    assert last.selected.all()
