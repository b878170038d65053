from __future__ import annotations

import importlib.util
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.metrics import metrics as library
from helpers.metrics import save_tiny_clip, save_tiny_dinov2
from PIL import Image, ImageOps

from diffusers_infogain.choices import METRICS
from diffusers_infogain.demo import shapes
from diffusers_infogain.evaluation import photographs
from diffusers_infogain.evaluation.features import CmmdFeatures, DemoFeatures, Dinov2Features
from diffusers_infogain.evaluation.measure import Measurement
from diffusers_infogain.evaluation.measure_settings import IMAGE_METRICS, MeasureSettings
from diffusers_infogain.evaluation.prompts import Prompt
from diffusers_infogain.evaluation.reference import ReferenceStatistics, read_reference, write_reference

pytestmark = pytest.mark.filterwarnings("ignore:.* images depends strongly on their number")

DEMO = MeasureSettings(features="demo", reference="demo", batch_size=5)
TITLE = f"FD ({DemoFeatures().name})"


def measure(paths, prompts, metrics, settings) -> dict[str, float]:
    return Measurement(metrics, settings).measure(paths, prompts)


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


def test_photographs_of_any_size_are_measured_as_if_resized_before(tmp_path):
    _, images = renderings(9, seed=0)
    (tmp_path / "photographs").mkdir()
    (tmp_path / "before").mkdir()
    for i, image in enumerate(images):
        large = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((100 + 10 * i, 90), Image.Resampling.BICUBIC)
        large.save(tmp_path / "photographs" / f"{i}.png")
        ImageOps.fit(large, (64, 64), Image.Resampling.BICUBIC).save(tmp_path / "before" / f"{i}.png")
    prompts, fake = renderings(7, seed=1)
    paths = saved(tmp_path / "fake", fake)
    save_tiny_clip(tmp_path / "clip")
    found = []
    for name in ("photographs", "before"):
        settings = MeasureSettings(
            features="demo", reference=str(tmp_path / name), clip_model=str(tmp_path / "clip"), batch_size=4, resize="bicubic"
        )
        found.append(measure(paths, prompts, ["frechet", "kid", "precision_recall", "clip_score"], settings))
    assert found[0] == found[1]
    assert measure(paths, prompts, ["clip_score"], MeasureSettings(clip_model=str(tmp_path / "clip")))["CLIP score"] == (
        pytest.approx(found[0]["CLIP score"], rel=1e-5)
    )
    with pytest.raises(ValueError, match="`images` must be demo images of 64 x 64 pixels, got 90 x 100"):
        measure(paths, None, ["frechet"], replace(settings, reference=str(tmp_path / "photographs"), resize="network"))


def test_the_reference_is_read_once_for_many_sets(tmp_path, monkeypatch):
    _, real = renderings(6, seed=0)
    _, fake = renderings(12, seed=1)
    sets = [saved(tmp_path / "a", fake[:6]), saved(tmp_path / "b", fake[6:])]
    metrics = ["frechet", "kid", "precision_recall", "diversity"]
    settings = MeasureSettings(features="demo", reference=str(saved(tmp_path / "real", real)[0].parent))
    apart = [measure(paths, None, metrics, settings) for paths in sets]
    decoded, decode = [], photographs.decode
    monkeypatch.setattr(photographs, "decode", lambda path: decoded.append(path.parent.name) or decode(path))
    measurement = Measurement(metrics, settings)
    assert [measurement.measure(paths) for paths in sets] == apart
    # every image once, however many metrics there are
    assert decoded == ["real"] * 6 + ["a"] * 6 + ["b"] * 6


def test_a_rendered_reference_follows_the_prompts(tmp_path):
    first, images = renderings(6, seed=0)
    paths = saved(tmp_path / "images", images)
    measurement = Measurement(["frechet"], DEMO)
    assert measurement.measure(paths, first)[TITLE] == pytest.approx(0, abs=1e-5)
    other = [Prompt("two blue squares")] * 6
    assert measurement.measure(paths, other) == measure(paths, other, ["frechet"], DEMO)
    with pytest.raises(ValueError, match="`prompts` must be one for each of the 6 images, got 5"):
        measurement.measure(paths, first[:5])


@pytest.mark.parametrize("as_reference", [True, False])
def test_statistics_stand_in_for_the_images_they_were_made_of(tmp_path, as_reference):
    _, real = renderings(8, seed=0)
    _, fake = renderings(8, seed=1)
    reference, paths = saved(tmp_path / "real", real), saved(tmp_path / "fake", fake)
    settings = MeasureSettings(features="demo", reference=str(tmp_path / "real"), resize="bilinear")
    expected = measure(paths, None, ["frechet"], settings)
    file = tmp_path / "real.npz"
    if as_reference:
        assert measure(paths, None, ["frechet"], replace(settings, save_statistics=file)) == expected
    else:
        assert measure(reference, None, [], replace(settings, reference=None, save_statistics=file)) == {}
    with np.load(file) as arrays:
        assert {"mu", "sigma"} < set(arrays)
    assert read_reference(file).origin.num_images == 8
    from_file = replace(settings, reference=str(file), resize=None)  # its own way of resizing
    assert measure(paths, None, ["frechet"], from_file)[TITLE] == pytest.approx(expected[TITLE], rel=1e-6)
    assert from_file.identity(["frechet"])["frechet"]["resize"] == "bilinear"
    save_tiny_clip(tmp_path / "clip")
    for changes, message in (
        (
            {"resize": "bicubic"},
            "must be statistics of images resized by 'bicubic', got .*real.npz of images resized by 'bilinear'",
        ),
        ({"features": "clip", "clip_model": str(tmp_path / "clip")}, "must be statistics of clip for frechet, got .* of demo"),
        ({"save_statistics": tmp_path / "b.npz"}, "`save_statistics` must be left out where the reference is statistics already"),
    ):
        with pytest.raises(ValueError, match=message):
            Measurement(["frechet"], replace(from_file, **changes))
    stats = read_reference(file)
    write_reference(file, replace(stats, origin=replace(stats.origin, weights="others")))
    with pytest.raises(ValueError, match=r"must be made with the same weights of demo, got .*real.npz of others"):
        Measurement(["frechet"], from_file)


def test_statistics_from_elsewhere_are_taken_as_the_network_resizes(tmp_path):
    write_reference(tmp_path / "adm.npz", ReferenceStatistics(np.zeros(64), np.eye(64)))
    settings = MeasureSettings(features="demo", reference=str(tmp_path / "adm.npz"))
    assert settings.resize_used == "network"
    assert replace(settings, resize="bicubic").resize_used == "bicubic"
    settings.check(["frechet"])
    if importlib.util.find_spec("torch_fidelity"):
        with pytest.raises(ValueError, match=r"`reference` must hold `mu_s` and `sigma_s` for spatial, got .*adm.npz without"):
            settings.check(["spatial"])


def test_few_images_are_warned_of_by_the_dimensions(tmp_path):
    _, images = renderings(3, seed=0)
    paths = saved(tmp_path / "images", images)
    settings = MeasureSettings(features="demo", reference=str(tmp_path / "images"))
    with pytest.warns(UserWarning, match=r"FD \(demo .* with 3 measured images depends strongly on .* \(below about 128\)"):
        measure(paths, None, ["frechet"], settings)
    measurement = Measurement(["frechet", "kid"], settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measurement._warn_of_few(128, "measured")
        measure(paths, None, ["kid", "diversity"], settings)  # not biased by the number of images


def test_damaged_images_of_a_reference_are_named_before_anything_is_made(tmp_path):
    _, images = renderings(3, seed=0)
    saved(tmp_path / "real", images)[1].write_bytes(b"no png")
    measurement = Measurement(["frechet"], MeasureSettings(features="demo", reference=str(tmp_path / "real")))
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be read: .*001.png \(damaged\)"):
        measurement.read_reference()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "nowhere"}, "nowhere is no folder of images."),
        ({"reference": "nowhere.npz"}, "nowhere.npz is missing."),
        ({"resize": "lanczos"}, "`resize` must be one of bicubic, bilinear, clean, network, got 'lanczos'."),
        ({"save_statistics": Path("a.pt")}, "`save_statistics` must be a file whose name ends with .npz, got a.pt."),
        (
            {"save_statistics": Path("nowhere/a.npz")},
            "`save_statistics` must be a file in a folder that exists, got nowhere/",
        ),
    ],
)
def test_what_is_missing_is_found_by_the_check(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "real" / "a.png")
    settings = MeasureSettings(features="demo", reference="real")
    settings.check(["frechet"])
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(settings, **changes).check(["frechet"])


def test_variety_within_a_caption_is_measured_against_renderings_of_the_same_prompts(tmp_path):
    prompts, images = renderings(12, seed=3)
    prompts, images = [prompts[index // 2] for index in range(12)], images[[0, 0, 2, 2, *range(4, 12)]]
    captions = [shapes.parse_caption(prompt.text) for prompt in prompts]
    real = (255 * shapes.render(shapes.sample_scenes(captions, torch.Generator().manual_seed(0)))).round().byte()
    expected = library.CaptionVariety(DemoFeatures("spatial"))
    texts = [prompt.text for prompt in prompts]
    expected.update(real, texts, real=True)
    expected.update(images, texts, real=False)
    paths = saved(tmp_path / "images", images)
    measurement = Measurement(["caption_variety", "frechet"], DEMO)
    for _ in range(2):  # the reference is read once
        found = measurement.measure(paths, prompts)
        for title, value in expected.figures().items():
            assert found[title] == pytest.approx(value.item(), rel=1e-4)
        assert TITLE in found


def test_copies_are_counted(tmp_path):
    _, images = renderings(3, seed=0)
    paths = saved(tmp_path / "images", images[[0, 0, 1, 2]])
    figures = measure(paths, None, ["diversity"], MeasureSettings(features="demo"))
    assert figures["distinct images"] == 0.75


def test_distances_in_dinov2_and_clip_are_the_librarys_on_the_same_images(tmp_path):
    _, real = renderings(8, seed=0)
    _, fake = renderings(8, seed=1)
    folder, paths = saved(tmp_path / "real", real)[0].parent, saved(tmp_path / "fake", fake)
    clip, dinov2 = save_tiny_clip(tmp_path / "clip"), save_tiny_dinov2(tmp_path / "dinov2")
    settings = MeasureSettings(reference=str(folder), cmmd_model=clip, dinov2_model=dinov2, resize="network", batch_size=3)
    metrics = ["fd_dinov2", "cmmd"]
    figures = measure(paths, None, metrics, settings)
    for metric in (library.FrechetDistance(Dinov2Features(dinov2)), library.Cmmd(CmmdFeatures(clip))):
        metric.update(real, real=True)
        metric.update(fake, real=False)
        for title, value in metric.figures().items():
            assert figures.pop(title) == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    assert figures == {}
    # The same by --features, with its statistics in a file, and all of it resized as clean-fid does.
    by_features = replace(settings, features="dinov2", resize="clean", save_statistics=tmp_path / "dinov2.npz")
    expected = measure(paths, None, ["frechet", "precision_recall"], by_features)
    assert list(expected) == ["FD (DINOv2 class token (dinov2))", "precision", "recall"]
    from_file = replace(settings, reference=str(tmp_path / "dinov2.npz"), resize=None)
    assert from_file.resize_used == "clean"
    assert measure(paths, None, ["fd_dinov2"], from_file)[next(iter(expected))] == pytest.approx(next(iter(expected.values())))
    identities = settings.identity(metrics)
    assert identities["cmmd"]["network"] == "cmmd"
    assert identities["fd_dinov2"]["resize"] == "network"
    save_tiny_clip(tmp_path / "clip", seed=1)
    assert settings.identity(metrics)["cmmd"] != identities["cmmd"]
    assert settings.identity(metrics)["fd_dinov2"] == identities["fd_dinov2"]


def test_fd_at_infinity_has_a_standard_error_and_takes_statistics(tmp_path):
    _, real = renderings(8, seed=0)
    _, fake = renderings(40, seed=1)
    paths = saved(tmp_path / "fake", fake)
    file = tmp_path / "real.npz"
    measure(saved(tmp_path / "real", real), None, [], MeasureSettings(features="demo", save_statistics=file))
    measurement = Measurement(["frechet", "fd_infinity"], MeasureSettings(features="demo", reference=str(file)))
    figures = measurement.measure(paths)
    title = TITLE.replace("FD", "FD∞")
    assert list(figures) == [TITLE, title]
    errors = measurement.measure_each(paths)["fd_infinity"].standard_errors
    assert list(errors) == [title]
    assert 0 < errors[title] < figures[title]
    assert figures[title] < figures[TITLE]
    assert measurement.measure(paths) == figures
    metric = library.FrechetDistanceAtInfinity(DemoFeatures())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert figures[title] == pytest.approx(metric.compute()[0].item(), rel=1e-3)


@pytest.mark.parametrize(
    ("metrics", "changes", "message"),
    [
        (
            ["fd_dinov2"],
            {"dinov2_model": "nowhere"},
            "`dinov2_model` must be a folder or Hub id of a DINOv2 model in safeten",
        ),
        (
            ["fd_dinov2"],
            {"dinov2_model": "clip"},
            "`dinov2_model` must be a DINOv2 model, got clip, whose config.json says",
        ),
        (
            ["cmmd"],
            {"cmmd_model": "empty"},
            "`cmmd_model` must be a folder or Hub id of a CLIP model in safetensors, got empty:",
        ),
        (["clip_score"], {"clip_model": "empty"}, "`clip_model` must be a folder or Hub id of a CLIP model in safetensors, got"),
        (["frechet"], {"features": "dinov2", "dinov2_model": "nowhere"}, "`dinov2_model` must be a folder or Hub id of a DINOv2"),
    ],
)
def test_models_that_are_missing_are_found_by_the_check(tmp_path, monkeypatch, metrics, changes, message):
    monkeypatch.chdir(tmp_path)
    for name in ("real", "empty"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "real" / "a.png")
    save_tiny_clip(tmp_path / "clip")
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        MeasureSettings(reference="real", **changes).check(metrics)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("metrics", "reference", "count", "beside"),
    [
        (["frechet"], "real", 500, True),
        (["frechet"], "demo", 500, False),
        (["frechet"], None, 500, False),
        (["frechet", "kid"], "real", 500, False),
        (["fd_dinov2"], "real", 500, False),
        (["frechet"], "real", 10_000, False),
        (["frechet"], "real", 1, False),
        (["frechet"], "real.npz", 500, False),
        (["frechet"], "adm-imagenet256", 500, False),
    ],
)
def test_a_kernel_distance_belongs_beside_that_of_few_images(tmp_path, monkeypatch, metrics, reference, count, beside):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    for index in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "real" / f"{index}.png")
    assert MeasureSettings(reference=reference).kid_beside(metrics, count) == beside
    monkeypatch.setattr("diffusers_infogain.evaluation.measure_settings._MOST_KEPT", 2)
    assert not MeasureSettings(reference=reference).kid_beside(metrics, count)


def test_the_table_of_metrics_has_those_that_can_be_chosen():
    assert (*IMAGE_METRICS, "composition") == (*[name for name in METRICS if name != "composition"], "composition")
    assert all(hasattr(library, metric.builder) for metric in IMAGE_METRICS.values())


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
        (["diversity"], {"features": "vgg"}, "`features` must be one of inception, clip, dinov2, demo, got 'vgg'."),
        (["frechet", "kid"], {}, "`reference` must be given for frechet, kid: a folder of real images or an .npz file."),
        (["kid"], {"reference": "a.npz"}, "`reference` must be a folder of images for kid, got a.npz."),
        (
            ["caption_variety"],
            {"reference": "real"},
            "`reference` must be 'demo', renderings of the prompts, for caption_variety, got real.",
        ),
        (["clip_score"], {}, "`clip_model` must be given for CLIP's score or features: a folder or a Hub id."),
        (["diversity"], {"features": "clip"}, "`clip_model` must be given for CLIP's score or features: a folder or a Hub id."),
        (
            ["frechet"],
            {"reference": "demo", "features": "demo"},
            "`prompts` must be given for the reference 'demo': one for each image.",
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
