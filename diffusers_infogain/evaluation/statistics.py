"""Means with their standard errors, and correlations with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Figure:
    """A value, its standard error (NaN if it is unknown), and the number n of images or texts behind it."""

    value: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.2g} (n = {self.n})"


def figures_as_json(figures: Mapping[str, Figure]) -> dict[str, dict[str, Any]]:
    """Figures as JSON takes them, with null for NaN."""
    return {
        name: {key: None if value != value else value for key, value in asdict(figure).items()}
        for name, figure in figures.items()
    }


def clustered_mean(values: Sequence[float], clusters: Sequence[int]) -> Figure:
    """The mean over all values with its cluster-robust standard error (clusters are prompts).

    Var = G / (G - 1) · Σ_g (Σ_{i ∈ g} (x_i - x̄))² / n² for n values in G clusters, which is s² / n with one value per cluster.
    The error is NaN for a single cluster.
    """
    x = torch.tensor(values, dtype=torch.double)
    index = torch.tensor(clusters).unique(return_inverse=True)[1]
    n = len(x)
    groups = int(index.max()) + 1
    sums = torch.zeros(groups, dtype=torch.double).index_add_(0, index, x - x.mean())
    variance = sums.square().sum() / n**2 * groups / (groups - 1) if groups > 1 else torch.tensor(math.nan)
    return Figure(x.mean().item(), variance.sqrt().item(), n)


def mean_over_seeds(values: Sequence[float], n: int) -> Figure:
    """The mean over seeds of a figure that only a whole set of n images has, with its standard error (NaN for one seed)."""
    x = torch.tensor(values, dtype=torch.double)
    return Figure(x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan, n)


@dataclass(frozen=True)
class Correlation:
    """Pearson's r over n points with its 95 % confidence interval by Fisher's z-transformation; NaN where they are undefined."""

    r: float
    low: float
    high: float
    n: int


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's r of two sequences, as `scipy.stats.pearsonr` gives it, which plain installations do not have.

    NaN for fewer than 4 points, for which there is no interval, and if either sequence is constant.
    """
    a, b = (torch.tensor(value, dtype=torch.double) for value in (x, y))
    if len(a) < 4:
        return Correlation(math.nan, math.nan, math.nan, len(a))
    r = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    if not abs(r) < 1:
        return Correlation(r, math.nan, math.nan, len(a))
    half = 1.959964 / math.sqrt(len(a) - 3)
    return Correlation(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), len(a))
