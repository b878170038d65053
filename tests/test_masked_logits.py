"""Logits at masked positions only: the same decisions, and no row for a known token."""

import pytest
import torch
from helpers.sampling import HashModel, generators, make_scheduler, random_logits

from diffusers_infogain import decode, decode_beam, decode_best_of
from diffusers_infogain.decoding import DecodingStep
from diffusers_infogain.masked_logits import MaskedLogits, concatenate, take_states
from diffusers_infogain.reductions import Reader

LENGTH, CODES = 9, 6
MASK = CODES + 1


class MaskedOnly:
    """A model that gives the logits of masked positions only."""

    def __init__(self, model: HashModel):
        self.model = model
        self.rows: list[int] = []

    def __call__(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, rows)[tokens == MASK]
        self.rows.append(len(logits))
        return logits


def both(search=decode, allowed=None, chunk=None, callback=None, **config):
    tokens = torch.full((3, LENGTH), MASK)
    tokens[1, :4] = 2
    outputs = []
    for wrap in (lambda model: model, MaskedOnly):
        model = HashModel(LENGTH, CODES, conditions=(3, 1, 4))
        options = {} if callback is None else {"callback": callback}
        options |= {decode_beam: {"num_beams": 2}, decode_best_of: {"num_runs": 3}}.get(search, {})
        outputs.append(
            search(
                wrap(model),
                make_scheduler(MASK, 5, **config),
                tokens,
                allowed=allowed,
                generator=generators(1, 2, 3),
                lookahead_batch_size=chunk,
                grid=(3, 3),
                **options,
            )
        )
    return outputs


def assert_equal(dense, masked) -> None:
    assert torch.equal(dense.tokens, masked.tokens)
    for name, value in dense.trace.tensors().items():
        assert torch.equal(value.nan_to_num(-1), getattr(masked.trace, name).nan_to_num(-1)), name


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(
    "config",
    [
        {"gain_reduction": "kl"},
        {"gain_reduction": "mean"},
        {"gain_reduction": "kl", "entropy_bound": 0.5},
        {"gain_reduction": "kl", "confidence_threshold": 0.4, "certainty": "margin"},
        {"certainty": "klass"},
        {"sampler": "lookum"},
        *({"sampler": name} for name in ("klass", "halton", "maskgit", "entropy_bound", "pivot", "pc_sampler")),
        {"sampler": "klass_parallel", "parallel_threshold": 0.4, "klass_threshold": 2.0},
    ],
    ids=str,
)
def test_decisions_are_those_of_full_logits(config, chunk):
    assert_equal(*both(chunk=chunk, **config))


def test_decisions_within_an_active_block():
    allowed = torch.ones(3, LENGTH, dtype=torch.bool)
    allowed[:, 6:] = False
    dense, masked = both(allowed=allowed)
    assert_equal(dense, masked)
    assert (masked.tokens[:, 6:] == MASK).all()


@pytest.mark.parametrize("search", [decode_beam, decode_best_of])
@pytest.mark.parametrize("certainty", ["maskgit", "klass"])
def test_searches_too(search, certainty):
    assert_equal(*both(search=search, certainty=certainty))


def test_after_an_edit_by_a_callback():
    def callback(step: DecodingStep) -> torch.Tensor:
        edited = step.tokens.clone()
        if step.index == 1:
            edited[0, :3] = MASK
        return edited

    assert_equal(*both(callback=callback, sampler="klass"))


def test_a_callback_sees_full_logits_at_masked_positions():
    seen = []
    both(callback=lambda step: seen.append(step.logits))
    dense, masked = seen[0], seen[len(seen) // 2].dense()
    undecided = torch.ones(3, LENGTH, dtype=torch.bool)
    undecided[1, :4] = False
    assert torch.equal(dense[undecided], masked[undecided])
    assert (masked[~undecided] == 0).all()


def test_no_row_is_made_for_a_known_token():
    model = MaskedOnly(HashModel(LENGTH, CODES))
    output = decode(model, make_scheduler(MASK, 4, sampler="confidence"), torch.full((1, LENGTH), MASK))
    left = [LENGTH]
    for decoded in output.trace.num_decoded[:, 0].tolist():
        left.append(left[-1] - decoded)
    assert model.rows == left[:-1]


def test_rows_and_states_are_those_of_the_full_tensor():
    where = torch.rand(2, 3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    dense = random_logits(2, 3, LENGTH, CODES).masked_fill(~where[..., None], 0)
    logits = MaskedLogits.at(where, dense[where])
    part = where & (torch.arange(LENGTH) < 5)
    assert logits.shape == dense.shape
    assert torch.equal(logits.dense(), dense)
    assert torch.equal(logits.rows_at(part), dense[part])
    assert torch.equal(Reader(logits, part, CODES).read(), dense[part])
    assert torch.equal(Reader(dense, part, CODES).read(), dense[part])
    flat = logits.flatten()
    assert torch.equal(flat.dense(), dense.flatten(0, 1))
    taken = take_states(flat, torch.tensor([2, 3]))
    assert torch.equal(taken.dense(), dense.flatten(0, 1)[[2, 3]])
    assert len(taken.rows) == int(where.flatten(0, 1)[[2, 3]].sum())
    places = where.nonzero(as_tuple=True)
    assert torch.equal(logits.rows_at(places), dense[places])
    assert torch.equal(Reader(logits, places, CODES).read(), dense[places])


def test_masked_logits_are_no_tensor():
    logits = MaskedLogits.at(torch.tensor([[True, False]]), torch.zeros(1, 3))
    with pytest.raises(TypeError, match="not subscriptable"):
        logits[0]
    for name in ("ndim", "view", "unsqueeze", "float"):
        assert not hasattr(logits, name)


@pytest.mark.parametrize("masked", [False, True])
def test_states_are_joined_and_taken_as_those_of_full_tensors(masked):
    where = torch.rand(5, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    dense = random_logits(5, LENGTH, CODES).masked_fill(~where[..., None], 0)
    parts = [MaskedLogits.at(w, d[w]) if masked else d for w, d in zip(where.split(2), dense.split(2), strict=True)]
    joined, places = concatenate(parts), torch.tensor([3, -1, 0])
    taken = take_states(joined, places)
    expected = torch.stack([dense[3], torch.zeros(LENGTH, CODES), dense[0]])
    assert torch.equal(joined.dense() if masked else joined, dense)
    assert torch.equal(taken.dense() if masked else taken, expected)
    assert take_states(joined, torch.arange(5)) is joined
    assert concatenate(parts[:1]) is parts[0]


def test_errors():
    where = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="one row for each of the 1 masked positions, got 2"):
        MaskedLogits.at(where, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at a position that was known"):
        MaskedLogits.at(where, torch.zeros(1, 3)).rows_at(torch.tensor([[True, True]]))
