from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from metric_helpers import metrics as library
from metric_helpers import save_tiny_clip
from PIL import Image

from diffusers_infogain.demo import shapes
from diffusers_infogain.evaluation.features import DemoFeatures
from diffusers_infogain.evaluation.measure import MeasureSettings, measure
from diffusers_infogain.evaluation.prompts import Prompt
from diffusers_infogain.evaluation.reference import ReferenceStatistics, write_reference

DEMO = MeasureSettings(features="demo", reference="demo", batch_size=5)
TITLE = f"FD ({DemoFeatures().name})"


def renderings(count: int, seed: int) -> tuple[list[Prompt], torch.Tensor]:
    captions = shapes.sample_captions(count, torch.Generator().manual_seed(1))
    pixels = shapes.render(shapes.sample_scenes(captions, torch.Generator().manual_seed(seed)))
    return [Prompt(caption.text) for caption in captions], (255 * pixels).round().byte()


def saved(folder, images):
    folder.mkdir()
    paths = [folder / f"{i:03d}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return paths


def test_every_metric_is_the_librarys_on_the_same_images(tmp_path):
    prompts, images = renderings(12, seed=3)
    _, real = renderings(12, seed=0)  # what the reference "demo" renders with the seed 0
    metrics = ["frechet", "kid", "precision_recall", "diversity"]
    figures = measure(saved(tmp_path / "images", images), prompts, metrics, DEMO)
    expected = library.FrechetDistance(DemoFeatures())
    expected.update(real, real=True)
    expected.update(images, real=False)
    assert figures[TITLE] == pytest.approx(expected.compute().item(), rel=1e-4)
    assert figures["distinct images"] == 1
    assert 0 <= figures["recall"] <= 1
    assert any(name.startswith("kernel distance (demo") for name in figures)
    # A folder and statistics of the same images say the same as the images.
    by_folder = measure(
        sorted((tmp_path / "images").iterdir()),
        None,
        ["frechet"],
        MeasureSettings(features="demo", reference=str(saved(tmp_path / "real", real)[0].parent)),
    )
    assert by_folder[TITLE] == pytest.approx(figures[TITLE], rel=1e-4)
    mu, sigma = (value.numpy() for value in expected.statistics(real=True))
    write_reference(tmp_path / "real.npz", ReferenceStatistics(mu, sigma))
    by_statistics = measure(
        sorted((tmp_path / "images").iterdir()),
        None,
        ["frechet"],
        MeasureSettings(features="demo", reference=str(tmp_path / "real.npz")),
    )
    assert by_statistics[TITLE] == pytest.approx(figures[TITLE], rel=1e-4)


def test_copies_are_counted(tmp_path):
    _, images = renderings(3, seed=0)
    paths = saved(tmp_path / "images", images[[0, 0, 1, 2]])
    figures = measure(paths, None, ["diversity"], MeasureSettings(features="demo"))
    assert figures["distinct images"] == 0.75


def test_nothing_is_loaded_for_composition_alone(tmp_path):
    assert measure([tmp_path / "nowhere.png"], None, ["composition"], MeasureSettings()) == {}


@pytest.mark.parametrize(
    ("metrics", "settings", "message"),
    [
        (
            ["fid"],
            {},
            "A metric must be one of composition, frechet, spatial, kid, inception_score, precision_recall, clip_score,",
        ),
        (["diversity"], {"features": "vgg"}, "`features` must be one of inception, clip, demo, got 'vgg'."),
        (["frechet", "kid"], {}, "`reference` must be given for frechet, kid: a folder of real images or an .npz file."),
        (["kid"], {"reference": "a.npz"}, "`reference` must be a folder of images for kid, got a.npz."),
        (["clip_score"], {}, "`clip_model` must be given for CLIP's score or features: a folder or a Hub id."),
        (["diversity"], {"features": "clip"}, "`clip_model` must be given for CLIP's score or features: a folder or a Hub id."),
        (
            ["frechet"],
            {"reference": "demo", "features": "demo"},
            "`prompts` must be given for clip_score or the reference 'demo'",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_first(tmp_path, metrics, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure([tmp_path / "nowhere.png"], None, metrics, MeasureSettings(**settings))


def test_an_identity_changes_with_what_changes_the_figures_and_with_nothing_else(tmp_path):
    _, images = renderings(4, seed=0)
    for name, chosen in (("a", images[:3]), ("copy", images[:3]), ("b", images[1:])):
        saved(tmp_path / name, chosen)

    def identity(metrics, **changes):
        settings = {"features": "demo", "reference": str(tmp_path / "a"), **changes}
        return json.loads(json.dumps(MeasureSettings(**settings).identity(metrics)))

    before = identity(["frechet", "kid", "diversity", "composition"])
    assert identity(["diversity", "frechet", "kid", "composition"], reference=str(tmp_path / "copy"), batch_size=3) == before
    other = identity(list(before), reference=str(tmp_path / "b"))
    assert {name for name in before if other[name] != before[name]} == {"frechet", "kid"}
    other = identity(list(before), features="inception")
    assert {name for name in before if other[name] != before[name]} == {"frechet", "kid", "diversity"}
    assert {name for name in before if identity(list(before), seed=1)[name] != before[name]} == {"kid"}
    assert identity(["kid"], subset_size=2) != identity(["kid"])
    assert identity(["frechet"], reference="demo") != identity(["frechet"], reference="demo", seed=1)
    save_tiny_clip(tmp_path / "clip")
    clip = identity(["clip_score"], clip_model=str(tmp_path / "clip"))
    save_tiny_clip(tmp_path / "clip", seed=1)
    assert identity(["clip_score"], clip_model=str(tmp_path / "clip")) != clip
    (tmp_path / "weights.pth").write_bytes(b"weights")
    weights = identity(["spatial"], inception_weights=tmp_path / "weights.pth")
    assert weights != identity(["spatial"])


def test_statistics_of_other_features_are_refused(tmp_path):
    _, images = renderings(3, seed=0)
    write_reference(tmp_path / "a.npz", ReferenceStatistics(np.zeros(7), np.eye(7)))
    settings = MeasureSettings(features="demo", reference=str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="features, got 7"):
        measure(saved(tmp_path / "images", images), None, ["frechet"], settings)
