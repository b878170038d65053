"""torch-fidelity's network, with random weights: what is wired to what."""

import importlib.util

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.metrics import metrics, random_images
from safetensors.torch import save_file

from diffusers_infogain.evaluation.features import InceptionFeatures
from diffusers_infogain.evaluation.reference import ReferenceStatistics, set_reference

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("torch_fidelity"), reason="needs torch-fidelity")

REAL, FAKE = random_images(3, seed=0, size=32), random_images(3, seed=1, size=32, high=128)


@pytest.fixture(scope="module")
def network():
    """The network as torch-fidelity builds it, without its download."""
    from torch_fidelity import feature_extractor_inceptionv3 as source

    class Network(source.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(source, "load_state_dict_from_url", lambda *args, **kwargs: {})
        torch.manual_seed(0)
        return Network("random", ["2048", "logits_unbiased"])


@pytest.fixture(scope="module")
def checkpoint(network, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def pool(checkpoint) -> InceptionFeatures:
    return InceptionFeatures("pool", weights=checkpoint)


@pytest.fixture(scope="module")
def spatial(network, tmp_path_factory) -> InceptionFeatures:
    path = tmp_path_factory.mktemp("inception") / "random.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return InceptionFeatures("spatial", weights=path)


def test_pool_and_logits_are_the_networks_own(network, pool, checkpoint):
    expected_pool, expected_logits = network(REAL)
    assert (pool.num_features, pool.name) == (2048, "InceptionV3 pool (torch-fidelity)")
    torch.testing.assert_close(pool(REAL), expected_pool)
    logits = InceptionFeatures("logits", weights=checkpoint)
    assert (logits.num_features, logits.name) == (1008, "InceptionV3 logits (torch-fidelity)")
    torch.testing.assert_close(logits(REAL), expected_logits)


def test_spatial_features_are_the_first_channels_of_the_third_17_by_17_block_in_tensorflows_order(network, spatial):
    found = spatial(REAL)
    assert found.shape == (3, 2023) == (3, spatial.num_features)
    blocks = []
    # the blocks' inputs, in the order of the forward pass: mixed_4 (6b), mixed_5 (6c), mixed_6 (6d), mixed_7 (6e)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        getattr(network, name).register_forward_pre_hook(lambda module, args: blocks.append((module, args[0].clone())))
    network(REAL)
    block, inputs = blocks[2]
    branch = block.branch1x1
    expected = torch.relu(branch.bn(torch.nn.functional.conv2d(inputs, branch.conv.weight)))[:, :7]
    torch.testing.assert_close(found, torch.stack([image.permute(1, 2, 0).flatten() for image in expected]))


def test_unrounded_images_reach_the_network_as_they_are(network, checkpoint):
    pixels = random_images(1, seed=3, size=299)
    unrounded = InceptionFeatures("pool", weights=checkpoint, unrounded=True)
    torch.testing.assert_close(unrounded(pixels.float()), network(pixels)[0], rtol=1e-4, atol=1e-5)
    seen = []
    with unrounded.network.Conv2d_1a_3x3.register_forward_hook(lambda module, args, output: seen.append(args[0])):
        unrounded(pixels + 0.25)  # quarters, as only unrounded images have
    torch.testing.assert_close(seen[0], (pixels + 0.25 - 128) / 128)
    assert metrics.FrechetDistance(unrounded).title == "clean-FID"
    assert metrics.FrechetDistanceAtInfinity(unrounded).title == "clean-FID∞"


def test_fid_equals_numpy_on_the_networks_features(network, pool):
    metric = metrics.FrechetDistance(pool)
    assert metric.title == "FID"
    real, fake = (network(images)[0].double().numpy() for images in (REAL, FAKE))
    for images, is_real in ((REAL, True), (FAKE, False)):
        for image in images.split(2):
            metric.update(image, real=is_real)
    # tr (Σ₁ Σ₂)^½ is the sum of singular values of X₁ X₂ᵀ for centred features, which a few images leave of low rank
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (real, fake))
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * scipy.linalg.svdvals(a @ b.T).sum()
    assert metric.compute().item() == pytest.approx(expected, rel=1e-3)


def test_spatial_metric_takes_the_spatial_reference(spatial):
    metric = metrics.FrechetDistance(spatial)
    assert metric.title == "sFID"
    pool_only = ReferenceStatistics(np.zeros(2048), np.eye(2048))
    with pytest.raises(ValueError, match="`stats` must hold `mu_s` and `sigma_s` for spatial features, got None"):
        set_reference(metric, pool_only)
    mu_s = np.arange(2023.0)
    set_reference(metric, ReferenceStatistics(pool_only.mu, pool_only.sigma, mu_s, np.eye(2023)))
    np.testing.assert_allclose(metric.statistics(real=True)[0], mu_s, rtol=1e-12)


def test_other_checkpoints_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"`weights` must be torch-fidelity's InceptionV3 checkpoint, got .*other\.pth"):
        InceptionFeatures(weights=tmp_path / "other.pth")


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('the checkpoint ran code')",)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"fc.bias": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth is a pickle that needs code to be read"):
        InceptionFeatures(weights=tmp_path / "evil.pth")
