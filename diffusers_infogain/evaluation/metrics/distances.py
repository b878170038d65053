"""Distances between the features of real and of generated images: Fréchet's, also without its bias, and those of kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..features import CmmdFeatures, Dinov2Features, FeatureExtractor, InceptionFeatures, torchvision_explained
from .accumulation import CHUNK, FeatureLists, require, seeded, without_warning_of_memory

with torchvision_explained():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

_SUBSET_SIZE = 1000
# Of FD∞: the numbers of images that the line is fitted to, and the smallest of them, as its authors have them.
_INFINITY_POINTS = 15
_SMALLEST_SUBSET = 5000
# Of CMMD: the bandwidth σ of the kernel, and the factor that makes its figures readable.
_CMMD_SIGMA = 10.0
_CMMD_SCALE = 1000.0


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
    return _distance_by_root(mu1, sigma1, _root(sigma1), mu2, sigma2)


def _root(sigma: torch.Tensor) -> torch.Tensor:
    """A = diag(λ^½) Vᵀ for Σ = V diag(λ) Vᵀ, (D, D)."""
    eigenvalues, vectors = torch.linalg.eigh(sigma)
    return eigenvalues.clamp(min=0).sqrt()[:, None] * vectors.T


def _distance_by_root(
    mu1: torch.Tensor, sigma1: torch.Tensor, a: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor
) -> torch.Tensor:
    """`frechet_distance` with the root A of Σ₁ at hand."""
    trace_of_root = torch.linalg.eigvalsh(a @ sigma2 @ a.T).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root
    return distance.clamp(min=0)


def _name(extractor: FeatureExtractor, infinity: str = "") -> str:
    """What the Fréchet distance of an extractor is called: its common name where network and output are those it stands for."""
    if isinstance(extractor, InceptionFeatures) and extractor.output != "logits":
        clean = "clean-" if extractor.unrounded else ""
        return clean + {"pool": "FID", "spatial": "sFID"}[extractor.output] + infinity
    if isinstance(extractor, Dinov2Features) and extractor.num_features == 1024:
        return f"FD-DINOv2{infinity}"
    return f"FD{infinity} ({extractor.name})"


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
        """The name "FID", "sFID" or "FD-DINOv2" where network and output are those it stands for, otherwise one with the
        extractor's name. FID of images that are resized as clean-fid does is "clean-FID".
        """
        return _name(self.inception)

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


class FrechetDistanceAtInfinity(FeatureLists, FrechetDistance):
    """FD∞ (Chong and Forsyth 2020, arXiv 1911.07023): the Fréchet distance that infinitely many generated images would have.

    The estimate from N images is about FD∞ + c / N. So it is taken of 15 numbers of images, at equal steps from the smaller of
    5,000 and N / 2 to N, each time of other images, and FD∞ is where a line through these distances over 1 / N meets 0. The bias
    by the number of real images stays.

    The subsets depend only on `seed`, and the global generators are left as they are.
    """

    fake_features: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, seed: int = 0, **kwargs: Any):
        super().__init__(extractor, **kwargs)
        self.seed = seed
        self._empty = {"fake_features": torch.empty(0, extractor.num_features)}
        self.add_state("fake_features", [], dist_reduce_fx="cat")

    @property
    def title(self) -> str:
        """The name of the distance with an ∞."""
        return _name(self.inception, "∞")

    def update(self, images: torch.Tensor, real: bool) -> None:
        """Adds real images to their sums, or keeps the features of generated ones."""
        if real:
            super().update(images, real=True)
        else:
            self.fake_features.append(self.inception(images))

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """FD∞ and its standard error by the fit, float64 scalars.

        The error is that of the line's intercept. What other images would change comes on top of it.

        Raises:
            ValueError: For fewer than 2 real or 30 generated images.
        """
        mu, sigma = self.statistics(real=True)
        features = self._stored("fake_features")
        count = len(features)
        require(self.title, 2 * _INFINITY_POINTS, generated=count)
        root, generator = _root(sigma), torch.Generator().manual_seed(self.seed)
        sizes = torch.linspace(min(_SMALLEST_SUBSET, count // 2), count, _INFINITY_POINTS).long()
        distances = []
        for size in sizes.tolist():
            chosen = torch.randperm(count, generator=generator)[:size].to(features.device)
            distances.append(_distance_by_root(mu, sigma, root, *_moments(features, chosen)))
        return _intercept(1 / sizes.double(), torch.stack(distances).cpu())

    def figures(self) -> dict[str, torch.Tensor]:
        """The distance by its title."""
        return {self.title: self.compute()[0]}

    def standard_errors(self) -> dict[str, torch.Tensor]:
        """The standard error by the title."""
        return {self.title: self.compute()[1]}


def _moments(features: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of the chosen rows of features (N, D), in float64, of which few are at a time."""
    mean = features[chosen].mean(0, dtype=torch.float64)
    outer = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for block in chosen.split(CHUNK):
        centred = features[block].double() - mean
        outer += centred.T @ centred
    return mean, outer / (len(chosen) - 1)


def _intercept(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value at 0 of the least-squares line through points (x, y), with its standard error."""
    n, mean = len(x), x.mean()
    spread = (x - mean).square().sum()
    slope = ((x - mean) * y).sum() / spread
    value = y.mean() - slope * mean
    variance = (y - value - slope * x).square().sum() / (n - 2)
    return value, (variance * (1 / n + mean**2 / spread)).sqrt()


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
        name = f"kernel distance ({self.inception.name})"
        if isinstance(self.inception, InceptionFeatures):
            name = "clean-KID" if self.inception.unrounded else "KID"
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


def squared_mmd(x: torch.Tensor, y: torch.Tensor, sigma: float = _CMMD_SIGMA) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared maximum mean discrepancy of features (N, D) and (M, D) under the kernel k(a, b) = exp(-|a - b|² / (2 σ²)).

    Returns:
        Two float64 scalars: the estimate of Gretton et al. 2012 (eq. 5), E k(x, x') + E k(y, y') - 2 E k(x, y) over all pairs,
        which is biased upwards; and the unbiased one, in which no x and no y is paired with itself.
    """
    # Means of 1 - k, which is small where k is close to 1, so that float32 is enough.
    n, m = len(x), len(y)
    within_x, within_y, between = _mean_gap(x, x, sigma), _mean_gap(y, y, sigma), _mean_gap(x, y, sigma)
    biased = 2 * between - within_x - within_y
    return biased, 2 * between - within_x * n / (n - 1) - within_y * m / (m - 1)


def _mean_gap(a: torch.Tensor, b: torch.Tensor, sigma: float) -> torch.Tensor:
    """Mean of 1 - exp(-|a - b|² / (2 σ²)) over all pairs of rows, in blocks of rows."""
    total, norms = torch.zeros((), dtype=torch.float64, device=a.device), b.square().sum(1)
    for block in a.split(CHUNK):
        squares = (block.square().sum(1)[:, None] + norms - 2 * block @ b.T).clamp(min=0)
        total -= torch.expm1(squares / (-2 * sigma**2)).double().sum()
    return total / (len(a) * len(b))


class Cmmd(FeatureLists):
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603): the squared MMD of normalised CLIP embeddings, σ = 10, times 1000.

    It makes no assumption about the distribution of the features. The authors' figure is the biased estimate; the unbiased one is
    reported beside it. They differ by at most 20 / (N - 1) for N images in both sets.

    Args:
        extractor: `CmmdFeatures()` for CMMD as published; features of others are normalised.
        reset_real_features: Whether `reset` forgets the real images too.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    extractor: FeatureExtractor
    real_features: list[torch.Tensor]
    fake_features: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, reset_real_features: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = extractor
        self.reset_real_features = reset_real_features
        self._empty = dict.fromkeys(("real_features", "fake_features"), torch.empty(0, extractor.num_features))
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")

    @property
    def title(self) -> str:
        """The name "CMMD" where the model is the one it stands for, otherwise one with the extractor's name."""
        shape = (self.extractor.input_size, self.extractor.num_features)
        return "CMMD" if isinstance(self.extractor, CmmdFeatures) and shape == (336, 768) else f"MMD ({self.extractor.name})"

    def update(self, images: torch.Tensor, real: bool) -> None:
        """Adds real or generated images."""
        features = torch.nn.functional.normalize(self.extractor(images), dim=1)
        (self.real_features if real else self.fake_features).append(features)

    def reset(self) -> None:
        """Forgets the generated images, and the real ones if `reset_real_features` is True."""
        kept = list(self.real_features)  # `Metric.reset` empties the list itself
        super().reset()
        if not self.reset_real_features:
            self.real_features = kept

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The biased and the unbiased estimate, times 1000.

        Raises:
            ValueError: For fewer than 2 real or generated images.
        """
        real, fake = self._stored("real_features"), self._stored("fake_features")
        require(self.title, 2, real=len(real), generated=len(fake))
        biased, unbiased = squared_mmd(real, fake)
        return _CMMD_SCALE * biased, _CMMD_SCALE * unbiased

    def figures(self) -> dict[str, torch.Tensor]:
        """Both estimates, by the title."""
        biased, unbiased = self.compute()
        return {self.title: biased, f"{self.title}, unbiased": unbiased}
