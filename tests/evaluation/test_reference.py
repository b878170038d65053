import os

import numpy as np
import pytest
import torch
from helpers.metrics import TinyFeatures, metrics, random_images, torchmetrics_fid

from diffusers_infogain.evaluation.reference import ReferenceStatistics, read_reference, set_reference, write_reference


def make_statistics(size: int = 6, seed: int = 0, spatial: bool = False) -> ReferenceStatistics:
    samples = np.random.default_rng(seed).normal(size=(50, size)) + 3
    pool = samples.mean(0), np.cov(samples, rowvar=False)
    return ReferenceStatistics(*pool, *(pool if spatial else ()))


@pytest.mark.parametrize("spatial", [False, True])
def test_statistics_survive_a_file(tmp_path, spatial):
    stats = make_statistics(spatial=spatial)
    write_reference(tmp_path / "stats.npz", stats)
    read = read_reference(tmp_path / "stats.npz")
    for name, value in vars(stats).items():
        np.testing.assert_equal(getattr(read, name), value)
    assert os.listdir(tmp_path) == ["stats.npz"]


def test_other_arrays_in_the_file_do_not_matter(tmp_path):
    stats = make_statistics()
    np.savez(tmp_path / "adm.npz", mu=stats.mu.astype(np.float32), sigma=stats.sigma, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    read = read_reference(tmp_path / "adm.npz")
    assert read.mu.dtype == np.float64
    assert read.mu_s is None
    np.testing.assert_allclose(read.mu, stats.mu, rtol=1e-6)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    write_reference(path, make_statistics())
    old = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        write_reference(path, make_statistics(seed=1))
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["stats.npz"]


def test_files_that_hold_no_statistics_are_named(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images.npz must hold `mu` and `sigma`, got arr_0\."):
        read_reference(tmp_path / "images.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"one.npy is not an .npz file"):
        read_reference(tmp_path / "one.npy")
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_reference(tmp_path / "pickle.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": np.eye(3)}, r"`mu` and `sigma` must have shapes \(D,\) and \(D, D\), got \(6,\) and \(3, 3\)\."),
        ({"mu": np.full(6, np.nan)}, "`mu` must be finite, got 6 values that are not"),
        ({"sigma": np.arange(36.0).reshape(6, 6)}, "`sigma` must be symmetric"),
        ({"mu_s": np.zeros(4)}, "`mu_s` and `sigma_s` must be given together"),
        ({"mu_s": np.zeros(4), "sigma_s": np.eye(5)}, "`mu_s` and `sigma_s` must have shapes"),
    ],
)
def test_statistics_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        ReferenceStatistics(**{**vars(make_statistics()), **changes})


@pytest.mark.parametrize("build", [torchmetrics_fid, metrics.FrechetDistance])
def test_a_reference_stands_in_for_the_real_images(build):
    extractor = TinyFeatures()
    whole = build(extractor)
    whole.update(random_images(60, seed=0), real=True)
    features = extractor(random_images(60, seed=0)).double().numpy()
    loaded = set_reference(build(extractor), ReferenceStatistics(features.mean(0), np.cov(features, rowvar=False)))
    for metric in (whole, loaded):
        metric.update(random_images(40, seed=1, high=200), real=False)
    assert loaded.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)


def test_a_reference_survives_reset_and_must_fit_the_features():
    metric = metrics.FrechetDistance(TinyFeatures())
    stats = make_statistics()
    set_reference(metric, stats)
    metric.update(random_images(10), real=False)
    first = metric.compute()
    metric.reset()
    metric.update(random_images(10), real=False)
    assert torch.equal(metric.compute(), first)
    mu, sigma = metric.statistics(real=True)
    np.testing.assert_allclose(mu, stats.mu, rtol=1e-12)
    np.testing.assert_allclose(sigma, stats.sigma, atol=1e-12)
    with pytest.raises(ValueError, match="`stats` must be of the metric's 6 features, got 4"):
        set_reference(metric, make_statistics(4))
