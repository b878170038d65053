"""Figures with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Figure:
    """A value, its standard error (NaN where it is unknown) and the number of images behind it."""

    value: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.2g} (n = {self.n})"


def figures_as_json(figures: Mapping[str, Figure]) -> dict[str, dict[str, Any]]:
    """Figures as JSON takes them: null in place of NaN."""
    return {
        name: {key: None if value != value else value for key, value in asdict(figure).items()}
        for name, figure in figures.items()
    }


def clustered_mean(values: Sequence[float], clusters: Sequence[int]) -> Figure:
    """The mean over all values, with a standard error that allows for values of one cluster (a prompt) hanging together.

    Var = G / (G - 1) · Σ_g (Σ_{i ∈ g} (x_i - x̄))² / n², G clusters, n values; with one value per cluster it is s² / n.
    """
    x = torch.tensor(values, dtype=torch.double)
    index = torch.tensor(clusters).unique(return_inverse=True)[1]
    groups, n = int(index.max()) + 1, len(x)
    sums = torch.zeros(groups, dtype=torch.double).index_add_(0, index, x - x.mean())
    variance = sums.square().sum() / n**2 * groups / (groups - 1) if groups > 1 else torch.tensor(math.nan)
    return Figure(x.mean().item(), variance.sqrt().item(), n)


def mean_over_seeds(values: Sequence[float], n: int) -> Figure:
    """The mean of a figure that only whole sets of images have, with the standard error of its spread over seeds."""
    x = torch.tensor(values, dtype=torch.double)
    return Figure(x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan, n)


@dataclass(frozen=True)
class Correlation:
    """Pearson's r and its 95 % confidence interval by Fisher's z-transformation, over n points; NaN where it is not defined."""

    r: float
    low: float
    high: float
    n: int


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's r of two sequences.

    NaN with fewer than 4 points, where it has no interval and any two points lie on a line, and if one of them is constant.
    """
    a, b = (torch.tensor(value, dtype=torch.double) for value in (x, y))
    if len(a) < 4:
        return Correlation(math.nan, math.nan, math.nan, len(a))
    r = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    if not abs(r) < 1:
        return Correlation(r, math.nan, math.nan, len(a))
    half = 1.959964 / math.sqrt(len(a) - 3)
    return Correlation(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), len(a))
