import itertools
import math

import pytest
import torch
from helpers.reference import chi_square, chi_square_bound, probabilities
from helpers.sampling import generators, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import candidates as draw

INF = math.inf
ALMOST_ONE = 1 - 2**-24  # the largest that torch.rand gives
edge_uniforms = st.sampled_from([0.0, 2**-24, 1e-30, 0.5, 1 - 2**-23, ALMOST_ONE]) | st.floats(0, ALMOST_ONE, width=32)


def brute_force_filter(logits: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """The tokens that survive; no two logits may be equal."""
    kept = sorted(range(len(logits)), key=lambda v: -logits[v])[:top_k]
    if top_p is None:
        return set(kept)
    p, mass = probabilities([logits[v] for v in kept]), 0.0
    for rank, value in enumerate(p):
        mass += value
        if mass >= top_p:
            return set(kept[: rank + 1])
    return set(kept)


def filtered(logits, top_k, top_p):
    """All logits, -inf for tokens that are not drawn."""
    logits = draw.keep_top_k(logits, top_k)
    if top_p is None or top_p >= 1:
        return logits
    return logits.masked_fill(~draw.nucleus(logits, top_p), -INF)


def best(scores, count):
    return draw.select_positions(scores, scores[:, 0], count)


def within_bound(scores, entropies, bound):
    return draw.select_positions(scores, entropies, torch.zeros(len(scores)), bound, bound_only=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_follow_the_softmax_at_the_temperature(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -INF, 0.5])
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(3))
    tokens = draw.sample_tokens(logits, uniform, temperature)
    p = torch.tensor(probabilities([value / temperature for value in logits.tolist()]))
    counts = tokens.bincount(minlength=6)
    assert counts[4] == 0
    kept = p > 0
    assert chi_square(counts[kept].tolist(), (20000 * p[kept]).tolist()) < chi_square_bound(5)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.7), (4, 0.9)])
def test_filtered_tokens_follow_the_renormalised_softmax(top_k, top_p):
    values = [0.3, 1.0, -1.0, 2.0, 0.1, 0.5]
    kept = sorted(brute_force_filter(values, top_k, top_p))
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(5))
    counts = draw.sample_tokens(torch.tensor(values), uniform, 1.0, top_k, top_p).bincount(minlength=6)
    expected = [20000 * p for p in probabilities([values[v] for v in kept])]
    assert counts[kept].sum() == 20000
    assert chi_square(counts[kept].tolist(), expected) < chi_square_bound(len(kept))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-200, 200, width=32) | st.just(-INF), min_size=1, max_size=40).filter(lambda row: max(row) > -INF),
    st.lists(edge_uniforms, min_size=1, max_size=6),
    st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    st.none() | st.integers(1, 6),
    st.none() | st.floats(0.01, 1),
)
def test_tokens_of_no_probability_never_come(row, uniforms, temperature, top_k, top_p):
    logits = torch.tensor(row)
    tokens = draw.sample_tokens(logits, torch.tensor(uniforms), temperature, top_k, top_p)
    assert tokens.shape == (len(uniforms),)
    assert ((tokens >= 0) & (tokens < len(row))).all()
    p = filtered(logits / temperature, top_k, top_p).softmax(-1)
    assert (p[tokens] > 0).all()


@pytest.mark.parametrize("size", [4, 1000, 8192])
def test_last_codes_of_no_probability_never_come(size):
    """Where rounding brings the scaled uniform number up to the total mass, the last token with any mass is meant."""
    logits = random_logits(300, size, scale=3)
    logits[:, -2:] = -INF
    logits[:, 0] = -INF
    uniform = torch.tensor([0.0, ALMOST_ONE, 1.0]).expand(300, 3)
    tokens = draw.sample_tokens(logits, uniform, 1.0)
    assert tokens.min() >= 1
    assert tokens.max() <= size - 3


def test_temperature_zero_takes_the_most_probable_token():
    logits = random_logits(4, 7, 11)
    tokens = draw.sample_tokens(logits, torch.rand(4, 7, 3), 0)
    assert torch.equal(tokens, logits.argmax(-1, keepdim=True).expand(4, 7, 3))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-60, 60), min_size=1, max_size=12, unique=True),
    st.none() | st.integers(1, 14),
    st.none() | st.floats(0.01, 0.999),
)
def test_filter_keeps_what_brute_force_keeps(values, top_k, top_p):
    row = [value / 10 + 0.001 * value**2 / 97 for value in values]
    mass = list(itertools.accumulate(probabilities(sorted(row, reverse=True)[:top_k])))
    if top_p is not None and min(abs(value - top_p) for value in mass) < 1e-5:
        return  # rounding may decide either way
    found = filtered(torch.tensor([row, row]), top_k, top_p)
    kept = brute_force_filter(row, top_k, top_p)
    for result in found.tolist():
        assert {v for v, value in enumerate(result) if value > -INF} == kept
        assert all(result[v] == pytest.approx(row[v]) for v in kept)


def test_filters_never_change_their_argument():
    logits = random_logits(3, 9)
    before = logits.clone()
    assert torch.equal(draw.keep_top_k(logits, None), before)
    assert torch.equal(draw.keep_top_k(logits, 9), before)
    draw.keep_top_k(logits, 2)
    draw.nucleus(logits, 0.4)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.9999])
def test_nucleus_of_large_vocabularies_is_that_of_a_full_sort(scale, top_p):
    logits = random_logits(4, 3000, scale=scale).double()
    logits[0] *= 10
    inside = draw.nucleus(logits, top_p)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    p = ordered.softmax(-1)
    sizes = (p.cumsum(-1) - p < top_p).sum(-1)
    assert (inside.sum(-1) - sizes).abs().max() <= (1 if scale == 0 else 0)  # 0.1 of 3000 equal tokens may be 300 or 301
    if scale > 0:  # else all are equal, and any will do
        for row in range(4):
            assert torch.equal(inside[row].nonzero()[:, 0], order[row, : sizes[row]].sort().values)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_gumbel_top_k_draws_without_replacement_in_proportion_to_the_exponentials(count, temperature):
    phi = [0.1, 0.9, 0.5, 0.3]
    weights = [math.exp(value / temperature) for value in phi]
    expected = dict.fromkeys(itertools.combinations(range(4), count), 0.0)
    for order in itertools.permutations(range(4), count):
        left, probability = sum(weights), 1.0
        for position in order:
            probability *= weights[position] / left
            left -= weights[position]
        expected[tuple(sorted(order))] += probability
    draws = 20000
    uniform = torch.rand(1, draws, 4, generator=torch.Generator().manual_seed(7))
    noisy = torch.tensor(phi) / temperature + draw.gumbel(uniform)
    selected = best(noisy, torch.tensor([count]))[0]
    found = [tuple(row.nonzero()[:, 0].tolist()) for row in selected]
    counts = [found.count(positions) for positions in expected]
    assert sum(counts) == draws
    assert chi_square(counts, [draws * p for p in expected.values()]) < chi_square_bound(len(expected))


def test_gumbel_noise_is_finite_at_the_ends_and_has_its_distribution():
    ends = draw.gumbel(torch.tensor([0.0, 2**-24, ALMOST_ONE]))
    assert ends.isfinite().all()
    assert ends[2] > 16  # bf16 noise would stop at 5.5
    assert draw.gumbel(torch.rand(5).bfloat16()).dtype == torch.float32
    u = torch.linspace(0.01, 0.99, 99)
    torch.testing.assert_close(torch.exp(-torch.exp(-draw.gumbel(u))), u, atol=1e-5, rtol=0)


def test_select_top_takes_exactly_the_count_of_each_sample_the_earlier_of_equals_first():
    scores = torch.tensor([[[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]], [[-INF, 5.0, -INF, 1.0], [4.0, 3.0, 2.0, 1.0]]])
    selected = best(scores, torch.tensor([1, 2]))
    assert selected.int().tolist() == [[[0, 1, 0, 0], [1, 0, 0, 0]], [[0, 1, 0, 1], [1, 1, 0, 0]]]
    assert best(scores, torch.tensor([0, 4])).sum(-1).tolist() == [[0, 0], [4, 4]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=8))
def test_first_occurrence_is_the_first_equal_state(states):
    candidates = torch.tensor([states, states[::-1]])
    expected = [[row.index(state) for state in row] for row in (states, states[::-1])]
    assert draw.first_occurrence(candidates).tolist() == expected


def test_same_positions_with_other_tokens_are_another_candidate():
    mask = 9
    states = torch.tensor([[[1, mask, mask], [2, mask, mask], [mask, 1, mask], [1, mask, mask]]])
    assert draw.first_occurrence(states).tolist() == [[0, 1, 2, 0]]


def test_children_of_a_generator_do_not_depend_on_the_batch_size():
    def streams(batch: int) -> list[list[float]]:
        children = draw.split_generator(torch.Generator().manual_seed(11), batch)
        return [torch.rand(3, generator=child).tolist() for child in children]

    assert streams(5)[:2] == streams(2)
    assert len({tuple(stream) for stream in streams(5)}) == 5


def test_without_a_generator_the_global_seed_decides():
    def numbers() -> list[float]:
        torch.manual_seed(5)
        return [torch.rand(1, generator=child).item() for child in draw.split_generator(None, 3)]

    assert numbers() == numbers()
    torch.manual_seed(6)
    assert torch.rand(1, generator=draw.split_generator(None, 1)[0]).item() != numbers()[0]


def test_one_seed_is_one_sample():
    """A generator and a list of it are the same; so are a batch's samples and each from its own seed."""

    def streams(generator, batch: int = 1) -> list[list[float]]:
        return [torch.rand(3, generator=child).tolist() for child in draw.split_generator(generator, batch)]

    (plain,) = generators(2)
    expected = torch.rand(3, generator=plain).tolist()
    assert streams(*generators(2)) == streams(generators(2)) == [expected]
    together, seeds = streams(*generators(2), batch=4), draw.sample_seeds(*generators(2), 4)
    assert together[0] == expected
    assert seeds[0] == 2
    assert together == [stream for seed in seeds for stream in streams(*generators(seed))]


def test_a_generator_that_was_drawn_from_gives_seeds_of_its_own():
    """The same ones alone and in a list; every call moves it on, and its samples come out again from the seeds."""
    for as_given in (lambda one: one, lambda one: [one]):
        (one,) = generators(2)
        first, second, third = (draw.sample_seeds(as_given(one), 1)[0] for _ in range(3))
        assert first == 2
        assert len({first, second, third}) == 3
        (other,) = generators(2)
        torch.rand(1, generator=other)
        drawn = draw.sample_seeds(as_given(other), 1)
        assert drawn != [2]
    shared = generators(7) * 3
    assert len(set(draw.sample_seeds(shared, 3))) == 3


def test_the_global_generator_gives_seeds_that_people_can_type():
    torch.manual_seed(2)
    assert draw.sample_seeds(None, 3) == draw.sample_seeds(*generators(2), 3)
    torch.seed()  # 64 random bits, as at the start of a program
    assert all(0 <= seed < 2**32 for seed in draw.sample_seeds(None, 3))


@pytest.mark.parametrize("generator", [42, "cpu", [1, 2], torch.rand(2), {}])
def test_what_is_no_generator_is_an_error(generator):
    message = "`generator` must be a torch.Generator, a list of them or None, got"
    with pytest.raises(ValueError, match=message):
        draw.split_generator(generator, 2)
    with pytest.raises(ValueError, match=message):
        draw.draw_uniforms(generator, 2, 4, 5)


@pytest.mark.parametrize("batch", [1, 3])
def test_list_of_another_length_than_the_batch_is_an_error(batch):
    message = f"`generator` is a list of 2 generators for a batch of {batch} samples"
    with pytest.raises(ValueError, match=message):
        draw.split_generator(generators(1, 2), batch)
    with pytest.raises(ValueError, match=message):
        draw.draw_uniforms(generators(1, 2), batch, 4, 5)


def test_uniforms_of_candidate_zero_do_not_depend_on_the_number_of_candidates():
    few, many = (draw.draw_uniforms(generators(3, 4), 2, num, 6) for num in (1, 8))
    assert many.shape == (2, 8, 2, 6)
    assert torch.equal(few[:, 0], many[:, 0])


def test_each_sample_has_its_own_stream():
    together = draw.draw_uniforms(generators(3, 4), 2, 5, 6)
    assert torch.equal(together[1:], draw.draw_uniforms(generators(4), 1, 5, 6))
    assert not torch.equal(together[0], together[1])
    single = draw.draw_uniforms(torch.Generator().manual_seed(3), 2, 5, 6)
    assert torch.equal(single[:1], together[:1])
    assert single.unique().numel() == single.numel()
    assert ((single >= 0) & (single < 1)).all()


@given(seed=st.integers(0, 10**6), bound=st.floats(0, 4), num=st.integers(1, 6))
def test_as_many_of_the_best_as_keep_the_sum_less_the_largest_entropy_within_the_bound(seed, bound, num):
    generator = torch.Generator().manual_seed(seed)
    scores, entropies = torch.rand(2, 3, num, generator=generator), 2 * torch.rand(2, num, generator=generator)
    scores[0, 0, 0] = -INF
    selected = within_bound(scores, entropies, bound)
    for b, n in itertools.product(range(2), range(3)):
        order = sorted((i for i in range(num) if scores[b, n, i] > -INF), key=lambda i: -scores[b, n, i])
        costs = [[entropies[b, i].item() for i in order[:count]] for count in range(1, len(order) + 1)]
        if any(abs(math.fsum(cost) - max(cost) - bound) < 1e-5 for cost in costs):
            continue  # rounding decides
        count = sum(math.fsum(cost) - max(cost) <= bound for cost in costs)
        assert set(selected[b, n].nonzero()[:, 0].tolist()) == set(order[:count])


def test_one_position_is_always_within_the_bound():
    entropies = torch.tensor([[3.0, 1.0]])
    assert within_bound(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), entropies, 0.0).tolist() == [[[False, True], [True, False]]]
