"""Distances as people judge: DINOv2 and CMMD as their authors compute them, and FD∞."""

import math

import numpy as np
import pytest
import torch
from helpers.metrics import TinyFeatures, golden, random_images, save_tiny_clip, save_tiny_dinov2
from PIL import Image
from safetensors.torch import save_file

from diffusers_infogain.evaluation import photographs
from diffusers_infogain.evaluation.features import ClipFeatures, CmmdFeatures, DemoFeatures, Dinov2Features
from diffusers_infogain.evaluation.measure_settings import LEAST_AT_INFINITY
from diffusers_infogain.evaluation.metrics import (
    Cmmd,
    FrechetDistance,
    FrechetDistanceAtInfinity,
    distances,
    frechet_distance,
    squared_mmd,
)
from diffusers_infogain.evaluation.reference import ReferenceStatistics, set_reference

PICTURES = [golden()[f"image.{index}"] for index in range(3)]  # (H, W, 3), none of them alike


def normal(count: int, seed: int, size: int = 6) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


class Given(TinyFeatures):
    """Features that the pixels of an image are."""

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, :2].flatten(1).float() / 64


def given(features: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, 1, 2) of about these features (B, 6)."""
    return (64 * features + 128).round().clamp(0, 255).byte().view(-1, 3, 1, 2)


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory) -> str:
    return save_tiny_dinov2(tmp_path_factory.mktemp("dinov2") / "tiny")


def test_dinov2s_features_are_those_of_dgm_eval(dinov2_folder):
    extractor = Dinov2Features(dinov2_folder)
    found = torch.cat([extractor(picture.permute(2, 0, 1)[None]) for picture in PICTURES])
    assert (extractor.num_features, extractor.input_size, extractor.name) == (16, 224, "DINOv2 class token (tiny)")
    torch.testing.assert_close(found, golden()["dinov2"], rtol=1e-5, atol=1e-5)
    at_size = torch.stack([photographs.resized(Image.fromarray(p.numpy()).resize((224, 224)), 224, "network") for p in PICTURES])
    torch.testing.assert_close(extractor(at_size), golden()["dinov2"], rtol=1e-5, atol=1e-5)


def test_dinov2s_features_are_those_of_dgm_eval_with_its_clean_resize(dinov2_folder):
    extractor = Dinov2Features(dinov2_folder, unrounded=True)
    pixels = torch.stack([photographs.resized(Image.fromarray(picture.numpy()), 224, "clean") for picture in PICTURES])
    torch.testing.assert_close(extractor(pixels), golden()["dinov2_clean"], rtol=1e-5, atol=1e-5)
    assert (golden()["dinov2_clean"] - golden()["dinov2"]).abs().max() > 1e-3


def test_the_clean_resize_is_clean_fids():
    for index, picture in enumerate(PICTURES):
        found = photographs.resized(Image.fromarray(picture.numpy()), 299, "clean")
        assert (found.shape, found.dtype) == ((3, 299, 299), torch.float32)
        assert 0 <= found.min() < found.max() <= 255
        torch.testing.assert_close(found.permute(1, 2, 0)[::13, ::13], golden()[f"clean_fid.{index}"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 3, 32, 64), torch.zeros(3, 64, 64)], ids=str
)
def test_an_extractor_of_unrounded_images_takes_nothing_else(images):
    with pytest.raises(ValueError, match=r"must be float32 of shape \(B, 3, 64, 64\), values from 0 to 255, .* got torch"):
        DemoFeatures(unrounded=True)(images)


def test_unrounded_and_rounded_images_have_about_the_same_features(tmp_path):
    images = random_images(4, size=64)
    torch.testing.assert_close(DemoFeatures(unrounded=True)(images.float()), DemoFeatures()(images))
    clip = save_tiny_clip(tmp_path / "clip")
    images = random_images(4, size=16)
    torch.testing.assert_close(ClipFeatures(clip, unrounded=True)(images.float()), ClipFeatures(clip)(images))


def test_cmmds_features_are_of_the_largest_centred_square_and_of_length_one(tmp_path):
    clip = save_tiny_clip(tmp_path / "clip")
    extractor = CmmdFeatures(clip)
    for height, width in ((16, 16), (31, 40), (60, 41)):
        image = random_images(1, size=60)[..., :height, :width]
        side, top, left = min(height, width), max(0, (height - width) // 2), max(0, (width - height) // 2)
        square = Image.fromarray(image[0].permute(1, 2, 0).numpy()).crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(square.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1)[None]
        expected = torch.nn.functional.normalize(ClipFeatures(clip)(pixels), dim=1)
        torch.testing.assert_close(extractor(image), expected)


def test_a_model_of_another_kind_or_without_all_its_weights_is_refused(tmp_path, dinov2_folder):
    clip = save_tiny_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"`model` must be a DINOv2 model, got .*clip, whose config.json says clip\."):
        Dinov2Features(clip)
    with pytest.raises(ValueError, match=r"`model` must be a CLIP model, got .*tiny, whose config.json says dinov2\."):
        CmmdFeatures(dinov2_folder)
    broken = tmp_path / "broken"
    save_tiny_dinov2(broken)
    weights = {name.removeprefix("weights."): value for name, value in golden().items() if name.startswith("weights.")}
    del weights["layernorm.bias"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"`model` must hold all weights of a DINOv2 model, got .* without 1, as layernorm.bias"):
        Dinov2Features(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"DINOv2 model in safetensors, got .*broken without model.safetensors\."):
        Dinov2Features(broken)


def mmd_by_hand(x: np.ndarray, y: np.ndarray, sigma: float) -> tuple[float, float]:
    def kernel(a, b):
        return math.exp(-((a - b) ** 2).sum() / (2 * sigma**2))

    def mean(a, b, skip=False):
        return np.mean([kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (skip and i == j)])

    return mean(x, x) + mean(y, y) - 2 * mean(x, y), mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y)


@pytest.mark.parametrize("sigma", [1.0, 10.0])
def test_squared_mmd_equals_brute_force(monkeypatch, sigma):
    monkeypatch.setattr(distances, "CHUNK", 5)
    x, y = normal(13, 0) + 0.3, normal(9, 1)
    found = squared_mmd(x.float(), y.float(), sigma)
    assert [value.item() for value in found] == pytest.approx(mmd_by_hand(x.numpy(), y.numpy(), sigma), rel=1e-4, abs=1e-7)


def test_squared_mmd_is_that_of_cmmds_public_code():
    x, y = (torch.nn.functional.normalize(golden()[f"embeddings.{index}"], dim=1) for index in range(2))
    assert 1000 * squared_mmd(x, y)[0].item() == pytest.approx(golden()["cmmd"].item(), abs=1e-5)


def test_the_unbiased_mmd_of_one_distribution_is_zero_on_average():
    found = np.array([[value.item() for value in squared_mmd(normal(20, s), normal(20, 500 + s), 2.0)] for s in range(200)])
    biased, unbiased = found.mean(0)
    assert abs(unbiased) < 3 * found[:, 1].std() / math.sqrt(200)
    assert biased > 10 * found[:, 0].std() / math.sqrt(200)


def test_cmmd_is_of_normalised_features_and_keeps_the_real_ones():
    metric = Cmmd(TinyFeatures(), reset_real_features=False)
    real, fake = random_images(12), random_images(9, seed=1, high=200)
    for part in (real[:5], real[5:]):
        metric.update(part, real=True)
    metric.update(fake, real=False)
    x, y = (torch.nn.functional.normalize(TinyFeatures()(images), dim=1) for images in (real, fake))
    biased, unbiased = squared_mmd(x, y)
    expected = {"MMD (tiny)": 1000 * biased, "MMD (tiny), unbiased": 1000 * unbiased}
    torch.testing.assert_close(metric.figures(), expected)
    metric.reset()
    metric.update(real, real=False)
    assert metric.compute()[0].item() == pytest.approx(0, abs=1e-6)
    metric.reset()
    metric.update(fake[:1], real=False)
    with pytest.raises(ValueError, match=r"MMD \(tiny\) needs at least 2 generated images, got 1"):
        metric.compute()


def test_the_intercept_is_that_of_least_squares():
    x, y = 1 / torch.arange(10.0, 25.0).double(), normal(15, 3)[:, 0]
    value, error = distances._intercept(x, y)
    design = np.stack([np.ones(15), x.numpy()], 1)
    solution, residual, *_ = np.linalg.lstsq(design, y.numpy(), rcond=None)
    assert value.item() == pytest.approx(solution[0])
    assert error.item() == pytest.approx(math.sqrt(residual[0] / 13 * np.linalg.inv(design.T @ design)[0, 0]))
    value, error = distances._intercept(x, 3 + 2 * x)
    assert (value.item(), error.item()) == pytest.approx((3, 0), abs=1e-9)


def at_infinity(fake: torch.Tensor, stats: ReferenceStatistics, seed: int = 0) -> FrechetDistanceAtInfinity:
    metric = set_reference(FrechetDistanceAtInfinity(Given(), seed), stats)
    for part in given(fake).split(50):
        metric.update(part, real=False)
    return metric


def test_fd_at_infinity_takes_away_the_bias_by_the_number_of_images():
    """It is 0 for infinitely many images like those of the reference."""
    stats = ReferenceStatistics(np.full(6, 2.0), np.eye(6) / 4)  # given() adds 2
    plain, extrapolated, errors = [], [], []
    for seed in range(20):
        value, error = at_infinity(normal(200, seed) * 0.5, stats).compute()
        extrapolated.append(value.item())
        errors.append(error.item())
        other = set_reference(FrechetDistance(Given()), stats)
        other.update(given(normal(200, seed) * 0.5), real=False)
        plain.append(other.compute().item())
    assert np.mean(plain) > 0.015
    assert abs(np.mean(extrapolated)) < np.mean(plain) / 5
    assert 0 < np.mean(errors) < 3 * np.std(extrapolated)


def test_fd_at_infinity_depends_on_its_seed_and_leaves_the_global_generator_alone():
    stats = ReferenceStatistics(np.full(6, 2.0), np.eye(6) / 4)
    state = torch.get_rng_state()
    first, again, other = (at_infinity(normal(60, 0) * 0.5, stats, seed) for seed in (0, 0, 1))
    assert first.figures() == again.figures()
    assert first.compute() != other.compute()
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first.figures()) == list(first.standard_errors()) == ["FD∞ (tiny)"]
    first.reset()  # which keeps the reference
    first.update(given(normal(60, 0) * 0.5), real=False)
    assert first.compute() == again.compute()


def test_fd_at_infinity_uses_all_images_last_and_half_of_them_first(monkeypatch):
    taken, moments = [], distances._moments
    monkeypatch.setattr(distances, "_moments", lambda x, chosen: taken.append(len(chosen)) or moments(x, chosen))
    at_infinity(normal(60, 0) * 0.5, ReferenceStatistics(np.full(6, 2.0), np.eye(6) / 4)).compute()
    assert (len(taken), taken[0], taken[-1]) == (15, 30, 60)
    assert taken == sorted(taken)
    assert LEAST_AT_INFINITY == 30
    with pytest.raises(ValueError, match=r"FD∞ \(tiny\) needs at least 30 generated images, got 29"):
        at_infinity(normal(29, 0), ReferenceStatistics(np.full(6, 2.0), np.eye(6))).compute()


def test_moments_in_blocks_are_those_of_all(monkeypatch):
    monkeypatch.setattr(distances, "CHUNK", 7)
    features, chosen = normal(50, 0).float() + 30, torch.randperm(50, generator=torch.Generator().manual_seed(0))[:31]
    mean, covariance = distances._moments(features, chosen)
    some = features[chosen].double()
    torch.testing.assert_close(mean, some.mean(0))
    torch.testing.assert_close(covariance, torch.cov(some.T))


def test_frechets_distance_is_dgm_evals():
    x, y = (golden()[f"embeddings.{index}"].double() for index in range(2))
    found = frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert found.item() == pytest.approx(golden()["fd"].item(), rel=1e-9)


def test_distances_are_titled_by_what_they_stand_for(dinov2_folder):
    small = Dinov2Features(dinov2_folder)
    assert FrechetDistance(small).title == "FD (DINOv2 class token (tiny))"
    small.num_features = 1024  # as of the ViT-L/14
    assert FrechetDistance(small).title == "FD-DINOv2"
    assert FrechetDistanceAtInfinity(small).title == "FD-DINOv2∞"
    assert FrechetDistanceAtInfinity(TinyFeatures()).title == "FD∞ (tiny)"
