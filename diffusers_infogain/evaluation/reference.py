"""Reads and writes statistics of reference images in the .npz format of OpenAI's evaluator for ADM, with their origin."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checks import check_integer, check_type
from ..files import parse_json, replacing
from ..tensor_files import read_npz
from .features import InceptionFeatures

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

# The covariance estimate comes out as `sigma` for any number n of images on one rank. Where each of R ranks holds the reference,
# it comes out as sigma · (1 - 1/n) / (1 - 1/(R n)): hence a large n, and a power of two, so that products with it are exact.
_NUM_IMAGES = 2**40

# The array with the origin of statistics, as the bytes of a JSON object. Other readers of ADM's format ignore it.
_ORIGIN_KEY = "infogain"


@dataclass(frozen=True)
class StatisticsOrigin:
    """How statistics were made: the number of images, how they were resized (see `photographs`), the network and its weights.

    Raises:
        ValueError: If a value has another type.
    """

    num_images: int
    resize: str
    network: str
    weights: str

    def __post_init__(self) -> None:
        check_integer("num_images", self.num_images, 2)
        for name in ("resize", "network", "weights"):
            check_type(name, getattr(self, name), str, "a string")


@dataclass(frozen=True)
class ReferenceStatistics:
    """Mean (D,) and covariance (D, D) of pool features, for FID, and of spatial features, for sFID (None if unknown).

    `origin` is None for a file that another program wrote.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or a covariance is not symmetric.
    """

    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    origin: StatisticsOrigin | None = None

    def __post_init__(self) -> None:
        if (self.mu_s is None) != (self.sigma_s is None):
            raise ValueError("`mu_s` and `sigma_s` must be given together, got one of them.")
        for mean_name, covariance_name in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if getattr(self, mean_name) is None:
                continue
            mean, covariance = (np.asarray(getattr(self, name), dtype=np.float64) for name in (mean_name, covariance_name))
            if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
                raise ValueError(
                    f"`{mean_name}` and `{covariance_name}` must have shapes (D,) and (D, D), "
                    f"got {mean.shape} and {covariance.shape}."
                )
            for name, value in ((mean_name, mean), (covariance_name, covariance)):
                if not np.isfinite(value).all():
                    raise ValueError(f"`{name}` must be finite, got {(~np.isfinite(value)).sum()} values that are not.")
                object.__setattr__(self, name, value)
            if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max(initial=0)):
                raise ValueError(f"`{covariance_name}` must be symmetric.")


def read_reference(path: str | os.PathLike) -> ReferenceStatistics:
    """Reads `mu` and `sigma`, and if the file has them `mu_s`, `sigma_s` and the origin.

    Raises:
        ValueError: If the file lacks a key or its arrays are no statistics.
        OSError: If it cannot be read.
    """
    arrays = read_npz(path, ("mu", "sigma"), ("mu_s", "sigma_s", _ORIGIN_KEY))
    origin = arrays.pop(_ORIGIN_KEY, None)
    try:
        return ReferenceStatistics(**arrays, origin=None if origin is None else _read_origin(origin))
    except ValueError as error:
        raise ValueError(f"{path} holds no statistics of images: {error}") from error


def _read_origin(content: np.ndarray) -> StatisticsOrigin:
    where = f"`{_ORIGIN_KEY}`"
    found = parse_json(content.astype(np.uint8).tobytes().decode(errors="replace"), where)
    names = [field.name for field in fields(StatisticsOrigin)]
    if sorted(found) != sorted(names):
        raise ValueError(f"{where} must hold {', '.join(names)}, got {', '.join(map(str, found)) or 'nothing'}.")
    return StatisticsOrigin(**found)


def write_reference(path: str | os.PathLike, stats: ReferenceStatistics) -> None:
    """Writes the statistics atomically."""
    arrays = {name: value for name, value in vars(stats).items() if name != "origin" and value is not None}
    if stats.origin is not None:
        arrays[_ORIGIN_KEY] = np.frombuffer(json.dumps(asdict(stats.origin)).encode(), np.uint8)
    with replacing(Path(path)) as file:
        np.savez(file, **arrays)


def set_reference(metric: FrechetInceptionDistance, stats: ReferenceStatistics) -> FrechetInceptionDistance:
    """Sets statistics in place of the real images of a Fréchet distance, and returns the metric; resets keep them.

    A metric with spatial Inception features takes `mu_s` and `sigma_s`. With several ranks, every rank may load the statistics.
    Real images that are added afterwards have practically no weight.

    Raises:
        ValueError: If the statistics do not fit the metric's features.
    """
    spatial = isinstance(metric.inception, InceptionFeatures) and metric.inception.output == "spatial"
    mu, sigma = (stats.mu_s, stats.sigma_s) if spatial else (stats.mu, stats.sigma)
    if mu is None or sigma is None:
        raise ValueError("`stats` must hold `mu_s` and `sigma_s` for spatial features, got None.")
    size = len(metric.real_features_sum)
    if len(mu) != size:
        raise ValueError(f"`stats` must be of the metric's {size} features, got {len(mu)}.")
    n = _NUM_IMAGES
    device = metric.real_features_sum.device
    metric.real_features_sum = torch.as_tensor(n * mu, device=device)
    metric.real_features_cov_sum = torch.as_tensor((n - 1) * sigma + n * np.outer(mu, mu), device=device)
    metric.real_features_num_samples = torch.tensor(n, device=device)
    metric.reset_real_features = False
    return metric
