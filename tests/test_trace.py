"""What a trace records of states and entropies, and what is drawn of it; pictures and films are in test_trace_pictures.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.reference import plain_entropy
from helpers.sampling import HashModel, generators, make_scheduler, partly_known
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import decode, decode_beam, decode_best_of
from diffusers_infogain.trace_view import SampleTrace

CODES, MASK, LENGTH = 6, 6, 12
KINDS = {
    "greedy": {"sampler": "confidence"},
    "all candidates": {"sampler": "info_gain", "num_candidates": 4},
    "lazy": {"sampler": "info_gain", "num_candidates": 4, "lazy_threshold": -1.0},
    "corrector": {"sampler": "confidence", "corrector": "remdm_conf", "remdm_eta": 0.3},
    "corrector that loops": {"sampler": "uniform", "corrector": "remdm_loop"},
    "verify": {"sampler": "confidence", "corrector": "verify"},
    "retries": {"sampler": "uniform", "retry_below_sigmas": -0.3, "num_tries": 3},
    "beams": {"sampler": "info_gain", "num_candidates": 3},
    "runs": {"sampler": "uniform"},
}


def run(kind: str, tokens: torch.Tensor, seeds: list[int], steps: int = 5, model: HashModel | None = None, **options):
    scheduler = make_scheduler(MASK, steps, **KINDS[kind])
    model = model or HashModel(tokens.shape[1], CODES, conditions=seeds)
    search = {"beams": decode_beam, "runs": decode_best_of}.get(kind, decode)
    options |= {"beams": {"num_beams": 2}, "runs": {"num_runs": 3}}.get(kind, {})
    return search(model, scheduler, tokens, generator=generators(*seeds), grid=(3, tokens.shape[1] // 3), **options)


def begins(trace, sample: int) -> torch.Tensor:
    """The states (T, L) that a sample's own steps began with, as the documentation says."""
    states = trace.states(sample)[:-1]
    own = ~trace.entropies[:, sample].isnan().all(-1)
    return torch.where(trace.entropies[own, sample].isnan(), states, MASK)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), steps=st.integers(1, 7), batch=st.integers(1, 3))
def test_states_and_entropies_are_those_of_the_model_and_lead_to_the_output(kind, seed, steps, batch):
    tokens = partly_known(batch, LENGTH, MASK, seed)
    tokens[:, 0] = MASK
    seeds = [seed + i for i in range(batch)]
    output = run(kind, tokens, seeds, steps)
    trace = output.trace
    assert torch.equal(trace.tokens[-1].long(), output.tokens)
    assert trace.tokens.dtype == torch.int32
    assert trace.entropies.dtype == torch.float32
    for sample in range(batch):
        states, entropies = begins(trace, sample), trace.entropies[:, sample]
        entropies = entropies[~entropies.isnan().all(-1)]
        assert torch.equal(trace.states(sample)[0].long(), tokens[sample])
        assert torch.equal(entropies.isnan(), states != MASK)
        model = HashModel(LENGTH, CODES, conditions=seeds)
        # A position that "verify" masks, and leaves as it was, is masked for the model, but not for the step.
        for state, found in zip(states.long(), entropies, strict=True) if kind != "verify" else ():
            logits = model(state[None], torch.tensor([sample]))[0]
            for position in (state == MASK).nonzero()[:, 0].tolist():
                assert found[position] == pytest.approx(plain_entropy(logits[position].tolist()), abs=1e-5)
        steps_of = trace.of_sample(sample)
        for position, step in enumerate(steps_of.decoded_at):
            after = trace.states(sample)[1:, position]
            if step >= 0:  # decoded once and for all in this step, and masked when it began
                assert states[step, position] == MASK
                assert (after[step:] == output.tokens[sample, position]).all()
            else:
                assert (after == tokens[sample, position]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_a_batch_is_drawn_as_it_is_alone(kind):
    tokens = partly_known(3, LENGTH, MASK, seed=3, share=0.6)
    tokens[1, 2:] = 0  # done early
    tokens[1, 0] = MASK
    together = run(kind, tokens, [5, 6, 7]).trace
    for sample in range(3):
        model = HashModel(LENGTH, CODES, conditions=[5 + sample])
        alone = run(kind, tokens[sample : sample + 1], [5 + sample], model=model).trace
        assert torch.equal(together.states(sample), alone.states(0))
        one, other = together.of_sample(sample), alone.of_sample(0)
        assert one.record() == other.record()
        assert torch.equal(one.entropies.nan_to_num(-1), other.entropies.nan_to_num(-1))


def test_what_a_callback_changes_is_in_the_trace():
    tokens = torch.full((1, LENGTH), MASK)

    def callback(step):
        if step.index == 0:
            return torch.cat([torch.full((1, 2), 3), step.tokens[:, 2:]], dim=1)
        return None

    output = run("greedy", tokens, [0], callback=callback)
    assert output.trace.tokens[0, 0, :2].tolist() == [3, 3]
    assert torch.equal(output.trace.tokens[-1].long(), output.tokens)


def test_a_try_that_was_given_up_leaves_the_canvas_as_it_was():
    tokens = partly_known(4, LENGTH, MASK, seed=1)
    trace = run("retries", tokens, [0, 1, 2, 3], 6).trace
    void = 0
    for sample in range(4):
        own = ~trace.entropies[:, sample].isnan().all(-1)
        before = trace.tokens[: int(own.int().argmax()), sample]
        assert torch.equal(before.long(), tokens[sample].expand_as(before))
        void += len(before)
    assert void, "some sample was begun anew"


def test_an_interrupted_decoding_ends_with_masks():
    output = run("greedy", torch.full((1, LENGTH), MASK), [0], interrupted=iter([False, True, True]).__next__)
    assert (output.trace.states(0)[-1] == MASK).any()
    assert -1 in output.trace.of_sample(0).decoded_at


def test_samples_that_do_not_exist_or_decoded_nothing_are_refused():
    tokens = torch.zeros(2, LENGTH, dtype=torch.long)
    tokens[0, 0] = MASK
    trace = run("greedy", tokens, [0, 1]).trace
    for sample in (2, -1, True, 0.0):
        with pytest.raises(ValueError, match=f"`sample` must be an integer.*, got {sample}."):
            trace.states(sample)
    with pytest.raises(ValueError, match=r"^Nothing of sample 1 was decoded: there is nothing to show\.$"):
        trace.plot(1)
    with pytest.raises(ValueError, match=r"^Only images of a pipeline have frames; `plot`, `html` and `ansi` show a text"):
        trace.frames(0)


def test_a_record_is_read_as_it_was_written():
    record = run("lazy", torch.full((1, LENGTH), MASK), [0]).trace.of_sample(0).record()
    assert record["lazy"]
    assert record["grid"] == [3, 4]
    assert SampleTrace.read(copy.deepcopy(record), "x").record() == record
    damages = [
        ({"grid": [3, 5]}, "x is damaged: its lists do not fit each other"),
        ({"grid": [12]}, "x is damaged: its lists do not fit each other"),
        ({"grid": [-3, -4]}, "x is damaged: its lists do not fit each other"),
        ({"winner": [0]}, "x is damaged: its lists do not fit each other"),
        ({"decoded_at": [99] * LENGTH}, "x is damaged: its lists do not fit each other"),
        ({"cost": ["a"]}, "x must have a list of float in its field `cost`"),
        ({"lazy": 1}, "x must have "),
    ]
    for change, message in damages:
        with pytest.raises(ValueError, match=message):
            SampleTrace.read(record | change, "x")
    with pytest.raises(ValueError, match="x must hold a JSON object"):
        SampleTrace.read([], "x")


def test_traces_can_be_pickled_and_copied():
    trace = run("lazy", torch.full((2, LENGTH), MASK), [0, 1]).trace
    for other in (pickle.loads(pickle.dumps(trace)), copy.deepcopy(trace)):
        assert other.view == trace.view
        assert other.of_sample(1).record() == trace.of_sample(1).record()
        assert repr(other) == repr(trace)
