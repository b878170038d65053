"""What metrics share: features kept in lists, seeded draws, distances of all pairs in blocks, checks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ..features import torchvision_explained

with torchvision_explained():
    from torchmetrics import Metric
    from torchmetrics.utilities.data import dim_zero_cat

CHUNK = 512
"""Rows of a distance matrix that are in memory at the same time."""


def require(title: str, least: int, **counts: Any) -> None:
    """Raises a ValueError where there are fewer than `least` images; `counts` are by what the message calls them."""
    for description, count in counts.items():
        if count < least:
            raise ValueError(f"{title} needs at least {least} {description} images, got {int(count)}.")


class FeatureLists(Metric):
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
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU's global generator within the block, and restores its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        yield


@contextlib.contextmanager
def without_warning_of_memory() -> Iterator[None]:
    """torchmetrics warns that these metrics keep all features; docs/evaluation.md says so, and how much memory that takes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Metric `.*` will save all extracted features")
        yield


def one_each(texts: list[str], images: torch.Tensor) -> list[str]:
    """The texts, or a ValueError if they are not one for each image."""
    if isinstance(texts, str) or len(images) != len(texts):
        raise ValueError(f"`texts` must be a list of one text for each of the {len(images)} images, got {texts!r}.")
    return texts


def pairwise_distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """Euclidean distances of all a (N, D) to all b (M, D), in blocks of rows.

    Computed without a matrix product, by which rounding leaves equal features a distance above 0.
    """
    for block in a.split(CHUNK):
        yield torch.cdist(block, b, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """Mean distance of all a (N, D) to all b (M, D), float64; without b of any two different rows of a."""
    total = torch.stack([block.double().sum() for block in pairwise_distances(a, a if b is None else b)]).sum()
    return total / (len(a) * (len(a) - 1 if b is None else len(b)))
