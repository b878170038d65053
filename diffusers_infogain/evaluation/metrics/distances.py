"""Distances between the features of real and of generated images: Fréchet's, and the kernel's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..features import FeatureExtractor, InceptionFeatures, torchvision_explained
from .accumulation import FeatureLists, require, seeded, without_warning_of_memory

with torchvision_explained():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

_SUBSET_SIZE = 1000


def frechet_distance(
    mu1: torch.Tensor | np.ndarray,
    sigma1: torch.Tensor | np.ndarray,
    mu2: torch.Tensor | np.ndarray,
    sigma2: torch.Tensor | np.ndarray,
) -> torch.Tensor:
    """Squared Fréchet distance of two normal distributions, |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), in float64.

    With Σ₁ = V diag(λ) Vᵀ and A = diag(λ^½) Vᵀ the symmetric matrix A Σ₂ Aᵀ has the eigenvalues of Σ₁ Σ₂, all real and at least
    0. Rounding leaves some of them, and a distance that should be 0, slightly negative: those are set to 0.

    Raises:
        ValueError: If shapes do not fit or a value is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(value).double() for value in (mu1, sigma1, mu2, sigma2))
    size = len(mu1)
    if mu2.shape != (size,) or sigma1.shape != (size, size) or sigma2.shape != (size, size):
        raise ValueError(
            "`mu1`, `mu2` must have shape (D,) and `sigma1`, `sigma2` (D, D), "
            f"got {', '.join(str(tuple(value.shape)) for value in (mu1, mu2, sigma1, sigma2))}."
        )
    if not all(value.isfinite().all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("`mu1`, `sigma1`, `mu2`, `sigma2` must be finite.")
    eigenvalues, vectors = torch.linalg.eigh(sigma1)
    a = eigenvalues.clamp(min=0).sqrt()[:, None] * vectors.T
    trace_of_root = torch.linalg.eigvalsh(a @ sigma2 @ a.T).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root
    return distance.clamp(min=0)


class FrechetDistance(FrechetInceptionDistance):
    """Squared Fréchet distance between the features of real and generated images (Heusel et al. 2017), for any extractor.

    The sums of torchmetrics' metric, accumulated in float64, with `frechet_distance` in place of the eigenvalues of a matrix
    that is not symmetric.
    """

    inception: FeatureExtractor

    def __init__(self, extractor: FeatureExtractor, **kwargs: Any):
        super().__init__(feature=extractor, normalize=False, **kwargs)

    @property
    def title(self) -> str:
        """The name "FID" or "sFID" where network and output are those it stands for, otherwise one with the extractor's name."""
        if isinstance(self.inception, InceptionFeatures) and self.inception.output != "logits":
            return {"pool": "FID", "spatial": "sFID"}[self.inception.output]
        return f"FD ({self.inception.name})"

    def statistics(self, real: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and unbiased covariance (D, D) of the features of the real or of the generated images so far, on this rank.

        Raises:
            ValueError: For fewer than two images.
        """
        prefix = "real_features" if real else "fake_features"
        total, outer, n = (getattr(self, f"{prefix}_{name}") for name in ("sum", "cov_sum", "num_samples"))
        require(self.title, 2, **{"real" if real else "generated": n})
        mu = total / n
        return mu, (outer - n * torch.outer(mu, mu)) / (n - 1)

    def compute(self) -> torch.Tensor:
        """The distance, a float64 scalar."""
        return frechet_distance(*self.statistics(real=True), *self.statistics(real=False))

    def figures(self) -> dict[str, torch.Tensor]:
        """The distance by its title."""
        return {self.title: self.compute()}


class _SeededKernelDistance(FeatureLists, KernelInceptionDistance):
    inception: FeatureExtractor

    def __init__(self, extractor: FeatureExtractor, subsets: int, subset_size: int | None, seed: int, **kwargs: Any):
        super().__init__(feature=extractor, subsets=subsets, subset_size=subset_size or _SUBSET_SIZE, normalize=False, **kwargs)
        self.as_many_as_there_are = subset_size is None
        self.seed = seed
        self._empty = dict.fromkeys(("real_features", "fake_features"), torch.empty(0, extractor.num_features))

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        counts = {"real": len(self._stored("real_features")), "generated": len(self._stored("fake_features"))}
        if self.as_many_as_there_are:
            self.subset_size = max(1, min(_SUBSET_SIZE, *counts.values()))
        for description, count in counts.items():
            if count < self.subset_size:
                raise ValueError(
                    f"`subset_size` must be at most the number of {description} images, {count}, got {self.subset_size}."
                )
        with seeded(self.seed):
            return super().compute()

    def figures(self) -> dict[str, torch.Tensor]:
        name = "KID" if isinstance(self.inception, InceptionFeatures) else f"kernel distance ({self.inception.name})"
        return {name: self.compute()[0]}


def kid(
    extractor: FeatureExtractor, *, subsets: int = 100, subset_size: int | None = 1000, seed: int = 0, **kwargs: Any
) -> _SeededKernelDistance:
    """torchmetrics' kernel distance (Bińkowski et al. 2018): mean and standard deviation over random subsets.

    The subsets depend only on `seed`, and the global generators are left as they are.

    Args:
        subset_size: Images in each subset; None: 1000, or all if there are fewer real or generated ones. `compute` raises a
            ValueError if there are fewer than a given number.

    Raises:
        ValueError: If `subset_size` is below 2.
    """
    if subset_size is not None and subset_size < 2:
        raise ValueError(f"`subset_size` must be at least 2, got {subset_size}.")
    with without_warning_of_memory():
        return _SeededKernelDistance(extractor, subsets, subset_size, seed, **kwargs)
