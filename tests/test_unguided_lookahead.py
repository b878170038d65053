"""A lookahead without guidance: candidates are compared by what `denoise` says, tokens drawn from what `guide` makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.sampling import HashModel, generators, make_scheduler

from diffusers_infogain import Denoised, InfoGainScheduler, decode, decode_beam, decode_best_of, scoring
from diffusers_infogain.masked_logits import MaskedLogits

LENGTH, CODES, STEPS = 12, 5, 4
MASK = CODES


class Guided:
    """A model and its guidance, which turns logits into other ones by a second model, and counts."""

    def __init__(self, masked_only: bool = False):
        self.plain, self.other = HashModel(LENGTH, CODES, conditions=(1, 2, 3)), HashModel(LENGTH, CODES, conditions=(7, 8, 9))
        self.masked_only = masked_only
        self.seen: list[list[int]] = []
        self.guided: list[list[int]] = []

    def denoise(self, tokens, sample_index):
        self.seen += [[int(sample), *state] for sample, state in zip(sample_index, tokens.tolist(), strict=True)]
        logits = self.plain(tokens, sample_index)
        return logits[tokens == MASK] if self.masked_only else logits

    def guide(self, logits, tokens, sample_index):
        self.guided += [[int(sample), *state] for sample, state in zip(sample_index, tokens.tolist(), strict=True)]
        uncond = self.other(tokens, sample_index)
        if isinstance(logits, MaskedLogits):
            rows = 3 * logits.rows - 2 * uncond[logits.index >= 0]
            return Denoised(MaskedLogits(rows, logits.index), torch.full_like(sample_index, 5))
        return Denoised(3 * logits - 2 * uncond, torch.full_like(sample_index, 5))


def canvas(batch: int) -> torch.Tensor:
    return torch.full((batch, LENGTH), MASK)


def by_hand(model: Guided, scheduler: InfoGainScheduler, sample: int) -> tuple[torch.Tensor, list[float]]:
    """The tokens of a sample by the definition, and the gain of every guided state."""
    tokens, index, memory, gains = canvas(1), torch.tensor([sample]), None, []
    generator = generators(sample)
    plain = model.plain(tokens, index)
    for timestep in scheduler.timesteps:
        if not (tokens == MASK).any():
            break
        proposal = scheduler.propose(
            3 * plain - 2 * model.other(tokens, index), timestep, tokens, generator=generator, memory=memory
        )
        memory = proposal.memory
        entropies = torch.where(tokens == MASK, scoring.entropy(plain), 0.0)
        proposal = replace(proposal, entropies=entropies, logits=None if proposal.logits is None else plain)
        lookahead = None
        if proposal.needs_lookahead:
            candidates = proposal.candidates.flatten(0, 1)
            lookahead = model.plain(candidates, index.expand(len(candidates)))[None]
        output = scheduler.select(lookahead, timestep, proposal)
        gains.append(float(output.gain[0, output.winner]))
        tokens = output.prev_sample
        plain = model.plain(tokens, index)
    return tokens[0], gains


@pytest.mark.parametrize("reduction", ["kl", "sum", "mean"])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("masked_only", [False, True])
def test_candidates_are_compared_by_what_the_plain_model_says_before_and_after(reduction, chunk, masked_only):
    scheduler = make_scheduler(MASK, STEPS, gain_reduction=reduction, num_candidates=4, entropy_bound=0)
    model = Guided(masked_only)
    options = {"guide": model.guide, "generator": generators(0, 1, 2), "lookahead_batch_size": chunk}
    output = decode(model.denoise, scheduler, canvas(3), **options)
    guided = torch.zeros(3, dtype=torch.long)
    for sample in range(3):
        tokens, gains = by_hand(Guided(), scheduler, sample)
        assert torch.equal(output.tokens[sample], tokens)
        assert output.trace.gain[:-1, sample].tolist() == pytest.approx(gains[:-1], rel=1e-5)
        guided[sample] = len(gains)
    # Every guided row counts 5 here, every other one 1.
    seen = torch.tensor([state[0] for state in model.seen]).bincount()
    assert torch.equal(output.trace.num_states.sum(0), seen)
    assert torch.equal(output.trace.num_evaluations.sum(0), seen + 5 * guided)
    assert torch.equal(torch.tensor([state[0] for state in model.guided]).bincount(), guided)
    # The canvas and its guidance, then candidates and the guidance of the best.
    assert output.trace.num_passes.T.tolist() == [[3, 2, 2, 1]] * 3


def test_it_is_not_a_guided_lookahead():
    scheduler = make_scheduler(MASK, STEPS, num_candidates=4, entropy_bound=0)
    model = Guided()
    output = decode(model.denoise, scheduler, canvas(3), generator=generators(0, 1, 2), guide=model.guide)
    guided = decode(
        lambda *state: model.guide(model.denoise(*state), *state), scheduler, canvas(3), generator=generators(0, 1, 2)
    )
    assert not torch.equal(output.trace.objective[0], guided.trace.objective[0])


@pytest.mark.parametrize(
    "settings",
    [{}, {"gain_reduction": "sum", "lazy_threshold": -1.0}, {"retry_below_nats": -12.0}, {"sampler": "margin"}],
    ids=str,
)
@pytest.mark.parametrize("search", [{}, {"num_beams": 1}, {"num_beams": 3}, {"num_runs": 2}], ids=str)
def test_guidance_that_changes_nothing_changes_no_token(settings, search):
    if "num_beams" in search and ("retry_below_nats" in settings or "sampler" in settings):
        return
    function = decode_beam if "num_beams" in search else decode_best_of if search else decode
    scheduler = make_scheduler(MASK, STEPS, num_candidates=3, entropy_bound=0, **settings)
    model = Guided()

    def same(logits, tokens, sample_index):
        return Denoised(logits, torch.zeros_like(sample_index))

    plain, guided = (
        function(model.plain, scheduler, canvas(3), generator=generators(0, 1, 2), guide=guide, **search)
        for guide in (None, same)
    )
    assert torch.equal(plain.tokens, guided.tokens)
    for name, value in plain.trace.tensors().items():
        assert torch.equal(value.nan_to_num(), guided.trace.tensors()[name].nan_to_num()), name


@pytest.mark.parametrize("reduction", ["kl", "sum", "mean"])
def test_one_beam_and_one_run_are_the_sampler(reduction):
    scheduler = make_scheduler(MASK, STEPS, gain_reduction=reduction, num_candidates=4, entropy_bound=0)
    model = Guided()
    expected = decode(model.denoise, scheduler, canvas(3), generator=generators(0, 1, 2), guide=model.guide)
    for function, one in ((decode_beam, {"num_beams": 1}), (decode_best_of, {"num_runs": 1})):
        output = function(model.denoise, scheduler, canvas(3), generator=generators(0, 1, 2), guide=model.guide, **one)
        assert torch.equal(output.tokens, expected.tokens)
        for name in ("num_states", "num_evaluations", "num_passes"):
            assert torch.equal(getattr(output.trace, name), getattr(expected.trace, name)), name


def test_every_run_is_guided_as_its_sample():
    model = Guided()
    scheduler = make_scheduler(MASK, STEPS, num_candidates=3, entropy_bound=0)
    decode_best_of(model.denoise, scheduler, canvas(3), num_runs=2, generator=generators(0, 1, 2), guide=model.guide)
    assert [state[0] for state in model.guided][:6] == [0, 0, 1, 1, 2, 2]


def test_another_try_guides_the_canvas_no_more():
    scheduler = make_scheduler(MASK, STEPS, num_candidates=3, entropy_bound=0, retry_below_nats=-1.0, num_tries=3)
    model = Guided()
    decode(model.denoise, scheduler, canvas(2), generator=generators(0, 1), guide=model.guide)
    for states in (model.seen, model.guided):
        assert sum(state.count(MASK) == LENGTH for state in states) == 2
    assert len(model.guided) > 2 * STEPS


def test_guidance_must_be_a_function():
    with pytest.raises(ValueError, match=r"`guide` must be a function or None, got 2\."):
        decode(Guided().denoise, make_scheduler(MASK, STEPS), canvas(1), guide=2)
