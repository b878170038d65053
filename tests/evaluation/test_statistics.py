from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_infogain.evaluation.statistics import clustered_mean, mean_over_seeds, pearson


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20))
def test_with_one_value_per_cluster_the_error_is_that_of_a_mean(values):
    figure = clustered_mean(values, list(range(len(values))))
    assert figure.value == pytest.approx(np.mean(values), abs=1e-9)
    assert figure.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)
    assert figure.n == len(values)


def test_copies_of_a_value_in_its_cluster_tell_nothing_new():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    once, thrice = clustered_mean(values, range(5)), clustered_mean(values * 3, list(range(5)) * 3)
    assert thrice.standard_error == pytest.approx(once.standard_error)
    assert thrice.n == 15


def test_the_clustered_error_is_the_spread_of_means_drawn_anew():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.rand(2000, 40, generator=generator)
    values = (torch.rand(2000, 40, 3, generator=generator) < prompts[..., None]).double()  # three seeds per prompt
    clusters = [i // 3 for i in range(120)]
    errors = [clustered_mean(draw.flatten().tolist(), clusters).standard_error for draw in values[:200]]
    assert np.mean(errors) == pytest.approx(values.mean((1, 2)).std().item(), rel=0.05)


def test_a_single_cluster_or_seed_has_no_error():
    assert math.isnan(clustered_mean([1.0, 2.0], [0, 0]).standard_error)
    assert math.isnan(mean_over_seeds([1.0], 10).standard_error)
    assert mean_over_seeds([1.0, 3.0], 10).standard_error == pytest.approx(1.0)


def test_pearson_and_its_interval_are_scipys():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, generator=generator)
    y = -0.7 * x + torch.randn(30, generator=generator)
    ours, theirs = pearson(x.tolist(), y.tolist()), scipy.stats.pearsonr(x.double(), y.double())
    interval = theirs.confidence_interval(0.95)
    assert (ours.r, ours.low, ours.high) == pytest.approx((theirs.statistic, interval.low, interval.high), abs=1e-6)
    assert math.isnan(pearson([1, 1, 1, 1], [1, 2, 3, 4]).r)
    for few in ([1, 2], [1, 2, 4]):  # two points lie on a line, and three have no interval
        assert math.isnan(pearson(few, few).r)
        assert pearson(few, few).n == len(few)
