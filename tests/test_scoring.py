import itertools
import math

import pytest
import torch
from helpers.reference import plain_entropy, plain_kl, probabilities
from helpers.sampling import random_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import scoring

INF = math.inf
logit_rows = st.integers(1, 12).flatmap(
    lambda size: st.lists(st.lists(st.floats(-30, 30, width=32), min_size=size, max_size=size), min_size=2, max_size=2)
)


def test_entropy_of_a_hand_computed_case():
    # p = 1/2, 1/4, 1/4 and p = 1/10, 9/10
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, math.log(9.0), -INF]])
    expected = [1.5 * math.log(2), 0.1 * math.log(10) + 0.9 * math.log(10 / 9)]
    torch.testing.assert_close(scoring.entropy(logits), torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000, 8192])
def test_entropy_of_the_uniform_distribution_is_the_logarithm_of_its_size(size):
    logits = torch.full((2, size), 3.7)
    padded = torch.cat([logits, torch.full((2, 5), -INF)], -1)
    for values in (logits, padded):
        torch.testing.assert_close(scoring.entropy(values), torch.full((2,), math.log(size)), atol=2e-5, rtol=0)


def test_entropy_of_a_certain_token_is_zero_and_nan_stays():
    assert scoring.entropy(torch.tensor([[-INF, 4.0, -INF], [0.0, 1e4, -1e4]])).tolist() == [0, 0]
    assert scoring.entropy(torch.tensor([1.0, math.nan])).isnan()


@settings(max_examples=40, deadline=None)
@given(logit_rows)
def test_scores_equal_plain_python(rows):
    logits, other = torch.tensor(rows[0]), torch.tensor(rows[1])
    p = sorted(probabilities(rows[0]), reverse=True)
    assert scoring.entropy(logits).item() == pytest.approx(plain_entropy(rows[0]), abs=1e-5)
    assert scoring.top_probability(logits).item() == pytest.approx(p[0], abs=1e-5)
    assert scoring.margin(logits).item() == pytest.approx(p[0] - p[1] if len(p) > 1 else 1, abs=1e-5)
    assert scoring.kl_divergence(logits, other).item() == pytest.approx(plain_kl(*rows), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["entropy", "top_probability", "margin", "kl_divergence"])
def test_half_precision_is_scored_in_float32(name, dtype):
    arguments = [random_logits(4, 3, 300, seed=seed).to(dtype) for seed in range(1 + (name == "kl_divergence"))]
    score = getattr(scoring, name)
    result = score(*arguments)
    assert result.dtype == torch.float32
    assert result.shape == (4, 3)
    assert torch.equal(result, score(*(value.float() for value in arguments)))


def test_kl_divergence_is_zero_for_equal_ones_infinite_beyond_the_support_and_asymmetric():
    p, q = torch.tensor([0.0, 1.0, -INF]), torch.tensor([0.0, 1.0, 2.0])
    assert scoring.kl_divergence(p, p).item() == 0
    assert scoring.kl_divergence(p, q).item() == pytest.approx(plain_kl([0, 1, -INF], [0, 1, 2]), abs=1e-6)
    assert scoring.kl_divergence(q, p).item() == INF


def test_cost_sums_the_decoded_entropies():
    entropies = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])
    selected = torch.tensor([[[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]]).bool()
    assert scoring.action_cost(entropies, selected).tolist() == [[5, 0, 14]]


@pytest.mark.parametrize(("reduction", "expected"), [("mean", [3, 4, 0]), ("sum", [9, 4, 0])])
def test_state_uncertainty_is_over_the_masked_positions_only_and_zero_without_any(reduction, expected):
    entropies = torch.tensor([[1.0, 2.0, 6.0, 8.0], [4.0, 5.0, 6.0, 7.0], [1.0, 1.0, 1.0, 1.0]])
    masked = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert scoring.state_uncertainty(entropies, masked, reduction).tolist() == expected


def test_uncertainty_is_the_mean_unless_said_otherwise():
    assert scoring.state_uncertainty(torch.tensor([1.0, 3.0]), torch.ones(2).bool()).item() == 2


def test_objective_is_the_weighted_gain_less_the_cost():
    gain = scoring.information_gain(torch.tensor([5.0, 1.0]), torch.tensor([[2.0, 6.0], [1.0, 0.5]]))
    assert gain.tolist() == [[3, -1], [0, 0.5]]
    cost = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    assert scoring.objective(gain, cost).tolist() == [[2, -3], [-4, 0.5]]
    assert scoring.objective(gain, cost, 0.5).tolist() == [[0.5, -2.5], [-4, 0.25]]


@given(seed=st.integers(0, 10**6))
def test_surprise_is_the_cost_and_the_divergence_of_what_stays_masked(seed):
    generator = torch.Generator().manual_seed(seed)
    cost, divergences = torch.rand(2, 3, generator=generator), torch.rand(2, 3, 4, generator=generator)
    masked = torch.rand(2, 3, 4, generator=generator) < 0.5
    found = scoring.surprise(cost, divergences, masked)
    for b, n in itertools.product(range(2), range(3)):
        kept = [divergences[b, n, i].item() for i in range(4) if masked[b, n, i]]
        assert found[b, n].item() == pytest.approx(cost[b, n].item() + math.fsum(kept), abs=1e-6)


def test_entropy_and_divergence_have_their_gradients():
    """dH/dx_v = -p_v (log p_v + H), d KL(p ‖ q)/dx_v = p_v (log p_v - log q_v - KL)."""
    logits = (3 * torch.randn(2, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    other = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    log_p = logits.detach().log_softmax(-1)
    entropy, kl = scoring.entropy(logits), scoring.kl_divergence(logits, other)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(gradient, -log_p.exp() * (log_p + entropy.detach()[:, None]), atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    expected = log_p.exp() * (log_p - other.log_softmax(-1) - kl.detach()[:, None])
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)
