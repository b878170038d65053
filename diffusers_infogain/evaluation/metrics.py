"""Metrics of sets of images as torchmetrics: they accumulate over batches and over ranks, also with unequal numbers of batches.

Images are uint8 (B, 3, H, W) throughout; features come from the modules of `features`. Besides torchmetrics' interface every
metric has `figures()`, its values by the names that reports print.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .features import ClipFeatures, FeatureExtractor, InceptionFeatures, torchvision_explained

with torchvision_explained():
    from torchmetrics import Metric
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance
    from torchmetrics.utilities.data import dim_zero_cat

# Rows of a distance matrix that are in memory at the same time.
_CHUNK = 512
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
        _require(self.title, 2, **{"real" if real else "generated": n})
        mu = total / n
        return mu, (outer - n * torch.outer(mu, mu)) / (n - 1)

    def compute(self) -> torch.Tensor:
        """The distance, a float64 scalar."""
        return frechet_distance(*self.statistics(real=True), *self.statistics(real=False))

    def figures(self) -> dict[str, torch.Tensor]:
        """The distance by its title."""
        return {self.title: self.compute()}


def _require(title: str, least: int, **counts: Any) -> None:
    """Raises a ValueError where there are fewer than `least` images; `counts` are by what the message calls them."""
    for description, count in counts.items():
        if count < least:
            raise ValueError(f"{title} needs at least {least} {description} images, got {int(count)}.")


class _FeatureLists(Metric):
    """A metric that keeps features in lists, which ranks gather as one tensor each.

    torchmetrics gathers a list entry by entry, so ranks with fewer batches hang or fail; and for a rank without any batch it
    substitutes a tensor with too few dimensions.
    """

    _empty: dict[str, torch.Tensor]
    """For each list a tensor without rows, of the shape and dtype that its entries have."""

    def _stored(self, name: str) -> torch.Tensor:
        """All entries of a list as one tensor."""
        value = getattr(self, name)
        return dim_zero_cat(value) if len(value) else self._empty[name].to(self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As `Metric.sync`, from one entry in each list."""
        if not self._is_synced:
            for name in self._empty:
                setattr(self, name, [self._stored(name)])
        super().sync(*args, **kwargs)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU's global generator within the block, and restores its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        yield


class _SeededKernelDistance(_FeatureLists, KernelInceptionDistance):
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
        with _seeded(self.seed):
            return super().compute()

    def figures(self) -> dict[str, torch.Tensor]:
        name = "KID" if isinstance(self.inception, InceptionFeatures) else f"kernel distance ({self.inception.name})"
        return {name: self.compute()[0]}


class _SeededInceptionScore(_FeatureLists, InceptionScore):
    title = "Inception score"

    def __init__(self, extractor: FeatureExtractor, splits: int, seed: int, **kwargs: Any):
        super().__init__(feature=extractor, splits=splits, normalize=False, **kwargs)
        self.seed = seed
        self._empty = {"features": torch.empty(0, extractor.num_features)}

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(self._stored("features"))
        # `chunk` makes fewer parts without a warning where the images do not fill them
        if count == 0 or len(torch.empty(count).chunk(self.splits)) != self.splits:
            raise ValueError(f"`splits` must be a number of parts that {count} images fill, got {self.splits}.")
        with _seeded(self.seed):
            return super().compute()

    def figures(self) -> dict[str, torch.Tensor]:
        return {self.title: self.compute()[0]}


@contextlib.contextmanager
def _without_warning_of_memory() -> Iterator[None]:
    """torchmetrics warns that these metrics keep all features; docs/evaluation.md says so, and how much memory that takes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Metric `.*` will save all extracted features")
        yield


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
    with _without_warning_of_memory():
        return _SeededKernelDistance(extractor, subsets, subset_size, seed, **kwargs)


def inception_score(extractor: FeatureExtractor, *, splits: int = 10, seed: int = 0, **kwargs: Any) -> _SeededInceptionScore:
    """torchmetrics' Inception score (Salimans et al. 2016): mean and standard deviation over the splits of the images.

    The splits depend only on `seed`, and the global generators are left as they are. `compute` raises a ValueError if there are
    too few images to fill the splits.

    Args:
        extractor: Its features are taken as logits: `InceptionFeatures("logits")` for the score as published.

    Raises:
        ValueError: If `splits` is below 2, where there is no standard deviation.
    """
    if splits < 2:
        raise ValueError(f"`splits` must be at least 2, got {splits}.")
    with _without_warning_of_memory():
        return _SeededInceptionScore(extractor, splits, seed, **kwargs)


def _one_each(texts: list[str], images: torch.Tensor) -> list[str]:
    """The texts, or a ValueError if they are not one for each image."""
    if isinstance(texts, str) or len(images) != len(texts):
        raise ValueError(f"`texts` must be a list of one text for each of the {len(images)} images, got {texts!r}.")
    return texts


class ClipScore(Metric):
    """Mean of 100 · max(cos(image, text), 0) over images and their prompts (Hessel et al. 2021), with any CLIP on disk.

    torchmetrics' `CLIPScore` sets only a negative mean to 0, not the negative terms, and agrees where there are none.

    Args:
        model: Folder or Hub id, or the `ClipFeatures` of one.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    score: torch.Tensor
    num_images: torch.Tensor

    def __init__(self, model: str | os.PathLike | ClipFeatures, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = model if isinstance(model, ClipFeatures) else ClipFeatures(model)
        self.add_state("score", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: torch.Tensor, texts: list[str]) -> None:
        """Adds images and the text that belongs to each.

        Raises:
            ValueError: If the images are not uint8, or not as many as the texts.
        """
        embedded = self.extractor.text_features(_one_each(texts, images))
        cosine = torch.nn.functional.cosine_similarity(self.extractor(images), embedded)
        self.score += 100 * cosine.clamp(min=0).double().sum()
        self.num_images += len(images)

    def compute(self) -> torch.Tensor:
        """The mean over all images, a float64 scalar."""
        _require("CLIP score", 1, captioned=self.num_images)
        return self.score / self.num_images

    def figures(self) -> dict[str, torch.Tensor]:
        """The mean as "CLIP score"."""
        return {"CLIP score": self.compute()}


def _distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """Euclidean distances of all a (N, D) to all b (M, D), in blocks of rows.

    Computed without a matrix product, by which rounding leaves equal features a distance above 0.
    """
    for block in a.split(_CHUNK):
        yield torch.cdist(block, b, compute_mode="donot_use_mm_for_euclid_dist")


def _share_inside(points: torch.Tensor, centres: torch.Tensor, k: int) -> torch.Tensor:
    """Share of the points that lie in some centre's ball, which reaches to the centre's k-th nearest other centre."""
    # k + 1, since the nearest centre of all is the centre itself
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distances(centres, centres)])
    return torch.cat([(block <= radii).any(1) for block in _distances(points, centres)]).double().mean()


class PrecisionRecall(_FeatureLists):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of generated images that lie in the real ones' manifold, the union of balls around their features that
    reach to the k-th nearest neighbor; recall is the share of real images in the manifold of the generated ones.

    Args:
        reset_real_features: Whether `reset` forgets the real images too; as in torchmetrics' own metrics.
    """

    is_differentiable = False
    full_state_update = False

    extractor: FeatureExtractor
    real_features: list[torch.Tensor]
    fake_features: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, k: int = 3, reset_real_features: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        self.extractor = extractor
        self.k = k
        self.reset_real_features = reset_real_features
        self._empty = dict.fromkeys(("real_features", "fake_features"), torch.empty(0, extractor.num_features))
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: torch.Tensor, real: bool) -> None:
        """Adds real or generated images."""
        (self.real_features if real else self.fake_features).append(self.extractor(images))

    def reset(self) -> None:
        """Forgets the generated images, and the real ones if `reset_real_features` is True."""
        if self.reset_real_features:
            super().reset()
            return
        default = self._defaults.pop("real_features")
        super().reset()
        self._defaults["real_features"] = default

    def compute(self) -> dict[str, torch.Tensor]:
        """`precision` and `recall`.

        Raises:
            ValueError: For fewer than k + 1 real or generated images.
        """
        real, fake = self._stored("real_features"), self._stored("fake_features")
        _require("Precision and recall", self.k + 1, real=len(real), generated=len(fake))
        return {"precision": _share_inside(fake, real, self.k), "recall": _share_inside(real, fake, self.k)}

    def figures(self) -> dict[str, torch.Tensor]:
        """`precision` and `recall`."""
        return self.compute()


class Diversity(_FeatureLists):
    """How much images differ: the mean distance of their features, and the share of distinct images.

    With groups, such as the images of one prompt each, only images of the same group are compared.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    extractor: FeatureExtractor
    features: list[torch.Tensor]
    keys: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = extractor
        self._empty = {
            "features": torch.empty(0, extractor.num_features),
            "keys": torch.empty(0, 3, dtype=torch.long),  # the group and 128 bits that stand for the pixels
        }
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: torch.Tensor, groups: torch.Tensor | list[int] | None = None) -> None:
        """Adds images, and for each the number of its group (None: all are of group 0).

        Raises:
            ValueError: If the images are not uint8, or `groups` is not one number for each.
        """
        numbers = torch.zeros(len(images), dtype=torch.long) if groups is None else torch.as_tensor(groups).cpu().long()
        if numbers.shape != (len(images),):
            raise ValueError(f"`groups` must be of shape ({len(images)},), got {tuple(numbers.shape)}.")
        self.features.append(self.extractor(images))
        digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.cpu().numpy()]
        pixels = torch.tensor([np.frombuffer(digest, dtype=np.int64).tolist() for digest in digests], dtype=torch.long)
        self.keys.append(torch.cat([numbers[:, None], pixels.view(-1, 2)], 1).to(images.device))

    def compute(self) -> dict[str, torch.Tensor]:
        """`distance`, the mean over all pairs of images of one group, and `distinct`, the share of images left without repeats.

        Raises:
            ValueError: If no two images are of one group.
        """
        features, keys = self._stored("features"), self._stored("keys")
        total, pairs = torch.zeros((), dtype=torch.float64, device=features.device), 0
        for group in keys[:, 0].unique():
            members = features[keys[:, 0] == group]
            total += sum(block.double().sum() for block in _distances(members, members)) / 2
            pairs += len(members) * (len(members) - 1) // 2
        if pairs == 0:
            raise ValueError(f"Diversity needs at least 2 images of one group, got {len(keys)} images without a pair.")
        distinct = torch.tensor(len(keys.unique(dim=0)) / len(keys), dtype=torch.float64, device=keys.device)
        return {"distance": total / pairs, "distinct": distinct}

    def figures(self) -> dict[str, torch.Tensor]:
        """The mean distance with the extractor's name, and the share as "distinct images"."""
        values = self.compute()
        return {f"pairwise distance ({self.extractor.name})": values["distance"], "distinct images": values["distinct"]}


class CaptionVariety(_FeatureLists):
    """How the generated images of a caption are spread, compared with real images of the same caption.

    With X, X' two generated and Y, Y' two real images of a caption, distances of features, and means over all images:

    - `variety` is E|X - X'| / E|Y - Y'|: 1 if generated images differ as much as real ones do, less if they are all alike.
    - `energy` is the energy distance (Székely and Rizzo 2013), (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / E|Y - Y'|: 0 if both are
      distributed alike, and about 0 or slightly below for samples of the same distribution, since X and X' are different samples.

    Captions with fewer than two generated or two real images do not count.
    """

    is_differentiable = False
    full_state_update = False

    extractor: FeatureExtractor
    real_features: list[torch.Tensor]
    fake_features: list[torch.Tensor]
    real_captions: list[torch.Tensor]
    fake_captions: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, reset_real_features: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = extractor
        self.reset_real_features = reset_real_features
        self._empty = {}
        for kind in ("real", "fake"):
            self._empty[f"{kind}_features"] = torch.empty(0, extractor.num_features)
            self._empty[f"{kind}_captions"] = torch.empty(0, dtype=torch.long)  # 64 bits that stand for each text
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: torch.Tensor, texts: list[str], real: bool) -> None:
        """Adds real or generated images, and the caption of each.

        Raises:
            ValueError: If the images are not uint8, or not as many as the texts.
        """
        digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in _one_each(texts, images)]
        captions = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.long)
        (self.real_features if real else self.fake_features).append(self.extractor(images))
        (self.real_captions if real else self.fake_captions).append(captions.to(images.device))

    def reset(self) -> None:
        """Forgets the generated images, and the real ones if `reset_real_features` is True."""
        kept = [list(self.real_features), list(self.real_captions)]  # `Metric.reset` empties the lists themselves
        super().reset()
        if not self.reset_real_features:
            self.real_features, self.real_captions = kept

    def compute(self) -> dict[str, torch.Tensor]:
        """`variety` and `energy`.

        Raises:
            ValueError: If no caption has two generated and two real images.
        """
        real, fake = self._stored("real_features"), self._stored("fake_features")
        sums, count = torch.zeros(3, dtype=torch.float64, device=fake.device), 0
        for caption in self._stored("fake_captions").unique():
            x, y = fake[self._stored("fake_captions") == caption], real[self._stored("real_captions") == caption]
            if len(x) > 1 and len(y) > 1:
                sums += len(x) * torch.stack([_mean_distance(x), _mean_distance(y), _mean_distance(x, y)])
                count += len(x)
        if count == 0:
            raise ValueError(
                f"Variety within a caption needs at least 2 generated and 2 real images of one, got {len(fake)} generated and "
                f"{len(real)} real images without such a caption."
            )
        within, within_real, between = sums
        return {"variety": within / within_real, "energy": (2 * between - within - within_real) / within_real}

    def figures(self) -> dict[str, torch.Tensor]:
        """The two as "variety within a caption" and "energy distance within a caption"."""
        values = self.compute()
        return {"variety within a caption": values["variety"], "energy distance within a caption": values["energy"]}


def _mean_distance(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """Mean distance of all a (N, D) to all b (M, D), float64; without b of any two different rows of a."""
    total = torch.stack([block.double().sum() for block in _distances(a, a if b is None else b)]).sum()
    return total / (len(a) * (len(a) - 1 if b is None else len(b)))
