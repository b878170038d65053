import sys

import numpy as np
import pytest
import torch
import transformers
from helpers.metrics import TinyFeatures, metrics, random_images, save_tiny_clip, torchmetrics_fid
from PIL import Image

from diffusers_infogain.demo import shapes
from diffusers_infogain.evaluation import features
from diffusers_infogain.evaluation.features import ClipFeatures, DemoFeatures, InceptionFeatures


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="module")
def clip(clip_folder) -> ClipFeatures:
    return ClipFeatures(clip_folder)


@pytest.fixture(scope="module")
def demo() -> DemoFeatures:
    return DemoFeatures()


@pytest.mark.parametrize(("name", "dimensions"), [("tiny", 6), ("clip", 8), ("demo", 64)])
def test_extractors_keep_the_contract(request, name, dimensions):
    extractor = TinyFeatures() if name == "tiny" else request.getfixturevalue(name)
    images = random_images(3, size=64)
    found = extractor(images)
    assert found.shape == (3, dimensions) == (3, extractor.num_features)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert isinstance(extractor.name, str)
    # alone as in a batch, and after an attempt to train
    torch.testing.assert_close(extractor.train()(images[:1]), found[:1], rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_features_of_the_demo_world_tell_where_objects_are_if_they_are_spatial(demo):
    caption = shapes.parse_caption("a red circle")
    images = (255 * shapes.render(shapes.sample_scenes([caption] * 2, torch.Generator().manual_seed(0)))).round().byte()
    spatial = DemoFeatures("spatial")
    assert spatial(images).shape == (2, spatial.num_features) == (2, 64 * 8 * 8)
    torch.testing.assert_close(spatial(images).view(2, 64, 8, 8).mean((2, 3)), demo(images), rtol=1e-4, atol=1e-5)
    means, channels = ((found[0] - found[1]).norm() / found.norm() for found in (demo(images), spatial(images)))
    assert channels > 5 * means


@pytest.mark.parametrize("build", [torchmetrics_fid, metrics.FrechetDistance, metrics.PrecisionRecall])
def test_metrics_cannot_put_an_extractor_into_training_mode(build):
    extractor = TinyFeatures()
    build(extractor).train()
    assert not any(module.training for module in extractor.modules())


@pytest.mark.parametrize(
    "images", [torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)]
)
def test_anything_but_uint8_color_images_is_refused(images):
    with pytest.raises(ValueError, match=r"`images` must be uint8 of shape \(B, 3, H, W\).*byte\(\).*got torch"):
        TinyFeatures()(images)


def test_clip_features_are_those_of_transformers_on_pillow_images(clip, clip_folder):
    images = random_images(2, size=24)
    assert clip.name == "CLIP image features (tiny-clip)"
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (clip.image_processor.image_mean, clip.image_processor.image_std))
    for image, found in zip(images, clip(images), strict=True):
        resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            pooled = model.vision_model(pixel_values=pixels[None]).pooler_output
            torch.testing.assert_close(found, model.visual_projection(pooled)[0], rtol=1e-4, atol=1e-5)


def test_clip_takes_a_tensor_from_transformers_4_and_an_output_from_5(clip, monkeypatch):
    images, texts = random_images(2), ["a cat", "dog"]
    expected = clip(images), clip.text_features(texts)
    for method in ("get_image_features", "get_text_features"):
        original = getattr(clip.network, method)
        monkeypatch.setattr(clip.network, method, lambda original=original, **inputs: features.pooled(original(**inputs)))
    torch.testing.assert_close((clip(images), clip.text_features(texts)), expected)


def test_long_texts_are_cut_with_a_warning_and_keep_their_end(clip):
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the 12 tokens"):
        long = clip.text_features(["abcdefghijklmnop", "a"])
    torch.testing.assert_close(long[1], clip.text_features(["a"])[0])
    # torchmetrics' own cut drops the end token, at which CLIP reads the text's features off
    assert clip.tokenizer("abcdefghijklmnop", truncation=True, max_length=12).input_ids[-1] == clip.tokenizer.eos_token_id


def test_inception_outputs_are_named():
    with pytest.raises(ValueError, match="`output` must be one of pool, spatial, logits, got 'mean'"):
        InceptionFeatures("mean")


def test_a_clip_that_is_not_there_is_one_sentence(tmp_path):
    for missing in (tmp_path, tmp_path / "nowhere", "no/such-model"):
        with pytest.raises(OSError, match=r"`model` must be a folder or Hub id of a CLIP model in safetensors, got") as caught:
            ClipFeatures(missing)
        assert len(str(caught.value).splitlines()) == 1


def test_missing_torch_fidelity_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs torch-fidelity: in a clone .* pip install -e '.\[inception\]'"):
        InceptionFeatures()


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'torchvision'"), RuntimeError("operator torchvision::nms")]
)
def test_a_torchvision_that_is_missing_or_broken_is_said(error):
    with (
        pytest.raises(ImportError, match="torch-fidelity is installed, but not the torchvision"),
        features.torchvision_explained(),
    ):
        raise error


def test_other_errors_of_an_import_stay_as_they_are():
    with pytest.raises(KeyError), features.torchvision_explained():
        raise KeyError("other")


def test_demo_features_want_demo_images(demo):
    with pytest.raises(ValueError, match="`images` must be demo images of 64 x 64 pixels, got 32 x 64"):
        demo(torch.zeros(1, 3, 32, 64, dtype=torch.uint8))


def demo_scenes(num: int, seed: int) -> shapes.Scenes:
    generator = torch.Generator().manual_seed(seed)
    return shapes.sample_scenes(shapes.sample_captions(num, generator), generator)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    return (255 * images).round().byte()


def test_demo_features_tell_defects_from_chance(demo):
    def moments(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.cat([demo(part) for part in images.split(50)]).double()
        return found.mean(0), torch.cov(found.T)

    num = 200
    real = moments(to_bytes(shapes.render(demo_scenes(num, 0))))
    scenes = demo_scenes(num, 1)
    other = shapes.render(scenes)
    missing = demo_scenes(num, 1)
    missing.shape[torch.rand(missing.shape.shape, generator=torch.Generator().manual_seed(2)) < 0.1] = -1
    defects = {
        "hue": other.roll(1, 1),
        "blur": torch.nn.functional.avg_pool2d(other, 3, stride=1, padding=1, count_include_pad=False),
        "missing": shapes.render(missing),
    }
    chance = metrics.frechet_distance(*real, *moments(to_bytes(other))).item()
    found = {name: metrics.frechet_distance(*real, *moments(to_bytes(images))).item() for name, images in defects.items()}
    assert found["hue"] > 2 * chance
    assert found["blur"] > 4 * chance
    assert found["missing"] > 10 * chance
