from __future__ import annotations

import json
import math
import re
import warnings

import pytest
import torch
from helpers.commands import run
from helpers.metrics import metrics, random_images
from helpers.preference import SCORES, preference_flags, save_preference_models, stored, stored_part
from PIL import Image
from safetensors.torch import save_file

from diffusers_infogain.checkpoints.clip import open_open_clip
from diffusers_infogain.evaluation import preference
from diffusers_infogain.evaluation.image_comparison import Results, image_groups
from diffusers_infogain.evaluation.measure import Measurement
from diffusers_infogain.evaluation.measure_settings import PREFERENCE_SETTINGS, MeasureSettings
from diffusers_infogain.evaluation.preference import PREFERENCES, load_preference
from diffusers_infogain.evaluation.prompts import Prompt
from diffusers_infogain.models.image_reward import open_image_reward

pytestmark = pytest.mark.filterwarnings("ignore:.* texts are longer than")
TITLES = {"pick_score": "PickScore", "hps_v2": "HPSv2", "hps_v2_1": "HPSv2.1", "image_reward": "ImageReward"}
TEXTS = ["a red bird", "two cats", "a dog"]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    return save_preference_models(tmp_path_factory.mktemp("preference"))


@pytest.fixture(scope="module")
def models(places) -> dict[str, preference.PreferenceModel]:
    settings = MeasureSettings(**places)
    return {name: load_preference(name, *settings.preference_sources(name)) for name in PREFERENCES}


@pytest.mark.parametrize("name", list(SCORES))
def test_scores_are_those_of_the_authors_code(models, name):
    tensors, content = stored()
    factor = 100 if name == "hps_v2" else 1  # as in the tables of the authors
    for number, (text, expected) in enumerate(zip(content["texts"], tensors[f"scores.{SCORES[name]}"], strict=True)):
        images = tensors[f"images.{number}"][None]
        found = models[name](images, [text])
        # cosines agree to 1e-6, which both of them show a hundredfold
        torch.testing.assert_close(found, factor * expected[None], rtol=1e-5, atol=1e-6 if name == "image_reward" else 1e-4)
    assert number == 3


def test_norms_and_activations_are_the_authors(models):
    # too small a difference to be seen in scores
    reward, clip = models["image_reward"].network, models["hps_v2"].network.config
    assert reward.vision_model.config.layer_norm_eps == 1e-6
    assert reward.text_model.config.layer_norm_eps == 1e-12
    for config in (clip.vision_config, clip.text_config):
        assert (config.layer_norm_eps, config.hidden_act) == (1e-5, "gelu")


@pytest.mark.parametrize("name", list(PREFERENCES))
def test_a_score_depends_on_its_own_image_and_text_only(models, name):
    model, images = models[name], random_images(3, size=40)
    found = model.train()(images, TEXTS)
    assert found.shape == (3,)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    alone = torch.cat([model(images[i : i + 1], [text]) for i, text in enumerate(TEXTS)])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    assert (model(images, TEXTS[::-1]) - found)[[0, 2]].abs().min() > 1e-3
    with pytest.raises(ValueError, match="`images` must be uint8"):
        model(images / 255, TEXTS)


def test_the_two_versions_of_hps_differ_in_their_title_and_file_only(models):
    images = random_images(2, size=40)
    assert models["hps_v2"](images, TEXTS[:2]).equal(models["hps_v2_1"](images, TEXTS[:2]))
    assert {name: model.title for name, model in models.items()} == TITLES
    assert PREFERENCES["hps_v2"].published == "HPS_v2_compressed.pt of xswu/HPSv2"
    assert PREFERENCES["hps_v2_1"].published == "HPS_v2.1_compressed.pt of xswu/HPSv2"


def test_hps_reads_entities_as_characters_and_curly_quotes_as_straight_ones(models):
    # in the tiny vocabulary all quotes are unknown, so what is read is looked at
    read, tokenizer = [], models["hps_v2"].tokenizer
    models["hps_v2"].tokenizer = lambda texts, **options: read.append(texts) or tokenizer(texts, **options)
    models["hps_v2"](random_images(1, size=30), ["a &amp;amp; b’s “c” &#100;"])
    models["hps_v2"].tokenizer = tokenizer
    assert read[-1] == ['a & b\'s "c" d']


def test_wide_and_tall_images_are_cut_around_the_centre(models):
    wide = random_images(1, size=90)[:, :, :30]
    for name in ("hps_v2", "image_reward"):
        expected = models[name](wide[..., 30:60], TEXTS[:1])
        torch.testing.assert_close(models[name](wide, TEXTS[:1]), expected, rtol=0.05, atol=0.5)
        assert models[name](wide[..., :30], TEXTS[:1]).item() != pytest.approx(expected.item(), rel=1e-3)
    assert [preference._margin(side, 28) for side in (28, 31, 33, 35)] == [0, 2, 2, 4]
    assert preference._scaled(40, 50, 28) == (28, 35)
    assert preference._scaled(78, 64, 28) == (34, 28)


def test_the_mean_is_over_images_and_every_score_is_kept(models):
    metric, images = metrics.PreferenceScore(models["pick_score"]), random_images(3, size=40)
    metric.update(images[:2], TEXTS[:2])
    metric.update(images[2:], TEXTS[2:])
    values = metric.values()["PickScore"]
    torch.testing.assert_close(values, models["pick_score"](images, TEXTS).double(), rtol=1e-5, atol=1e-5)
    assert metric.figures() == {"PickScore": values.mean()}
    with pytest.raises(ValueError, match="`texts` must be a list of one text for each of the 3 images"):
        metric.update(images, TEXTS[:2])
    metric.reset()
    with pytest.raises(ValueError, match="PickScore needs at least 1 captioned images, got 0"):
        metric.compute()


def test_images_of_several_sizes_are_scored_as_they_are(models, places, tmp_path):
    paths = []
    for number, size in enumerate((40, 40, 33, 64, 64)):
        pixels = random_images(1, seed=number, size=size)[0]
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(paths[-1])
    prompts = [Prompt(text) for text in (*TEXTS, *TEXTS[:2])]
    # beside a metric of images that are resized
    measurement = Measurement([*PREFERENCES, "diversity"], MeasureSettings("demo", **places, batch_size=2))
    found = measurement.measure_each(paths, prompts)
    for name, title in TITLES.items():
        expected = torch.cat(
            [models[name](random_images(1, seed=i, size=s), [prompts[i].text]) for i, s in enumerate((40, 40, 33))]
        )
        torch.testing.assert_close(torch.tensor(found[name].values[title][:3]), expected, rtol=1e-4, atol=1e-4)
        assert len(found[name].values[title]) == 5
        assert found[name].figures[title] == pytest.approx(math.fsum(found[name].values[title]) / 5)
    assert found["diversity"].values == {}


def test_evaluate_reports_standard_errors_and_compare_keeps_the_scores(capsys, places, tmp_path):
    common = ["--num-prompts", 2, "--num-images", 2, "--device", "cpu", "--metrics", "pick_score", "image_reward"]
    common += preference_flags(places)
    code, out, err = run(capsys, "evaluate", "--output", tmp_path / "one", "--steps", 2, "--sampler", "maskgit", *common)
    assert code == 0, err
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    figure = report["figures"]["PickScore"]
    assert figure["n"] == 4
    assert figure["standard_error"] > 0
    assert "| PickScore |" in out
    assert report["measured"]["metrics"]["image_reward"]["resize"] == "own"
    assert len(report["scores"]["ImageReward"]) == 4
    assert sum(report["scores"]["PickScore"]) / 4 == pytest.approx(figure["value"], abs=1e-5)
    flags = ["--samplers", "maskgit", "--steps", 2, "--seeds", 0, 1, "--grid", 0]
    code, out, err = run(capsys, "compare", "--output", tmp_path / "all", *flags, *common)
    assert code == 0, err
    content = json.loads((tmp_path / "all" / "results.json").read_text())
    scores = [run["metrics"]["pick_score"]["values"]["PickScore"] for run in content["runs"]]
    # the same captions and seeds as above are the same images
    assert sum(scores[0]) / 4 == pytest.approx(figure["value"], abs=1e-4)
    # clusters are prompts: of 4 images and two seeds each
    sums = [sum(scores[seed][2 * prompt + copy] for seed in (0, 1) for copy in (0, 1)) for prompt in (0, 1)]
    mean = sum(sums) / 8
    error = math.sqrt(2 * sum((total - 4 * mean) ** 2 for total in sums)) / 8
    (summary,) = content["summary"]
    assert summary["figures"]["PickScore"] == {
        "value": pytest.approx(mean),
        "standard_error": pytest.approx(error),
        "n": 8,
    }
    assert "PickScore" in out
    # records without single scores, from before there were any, still have their mean over seeds
    for record in content["runs"]:
        del record["metrics"]["pick_score"]["values"]
    (group,) = image_groups(content["runs"])
    assert group.figures["PickScore"].value == pytest.approx(mean)
    content["runs"][0]["metrics"]["image_reward"]["values"]["ImageReward"].pop()
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"The metric image_reward of Run 1 of .* must have the scores of 4 images"):
        Results(tmp_path / "results.json", content["settings"])


@pytest.mark.parametrize(
    ("metric", "changed", "message"),
    [
        ("image_reward", {"image_reward_weights": "nowhere.pt"}, "nowhere.pt is missing."),
        (
            "hps_v2_1",
            {"hps_v2_1_weights": None},
            "hps_v2_1 needs its weights, HPS_v2.1_compressed.pt of xswu/HPSv2 on the Hub (--hps-v2-1-weights names another",
        ),
        (
            "hps_v2",
            {"hps_v2_weights": "processor"},
            "processor has none of HPS_v2_compressed.safetensors, HPS_v2_compressed.pt.",
        ),
        ("pick_score", {"pick_score_weights": "bert"}, "bert/config.json is missing."),
        ("pick_score", {"pick_score_weights": "processor"}, "processor has no weights: none of model.safetensors, pytorch_model"),
        (
            "pick_score",
            {"clip_h_processor": None},
            "pick_score needs the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K on the Hub (--clip-h-processor names",
        ),
        ("image_reward", {"bert_tokenizer": "nowhere"}, "needs the tokenizer of google-bert/bert-base-uncased on the Hub"),
        ("image_reward", {"bert_tokenizer": "pick"}, "pick has no tokenizer: none of tokenizer.json, vocab.txt is there."),
        ("hps_v2", {"clip_h_processor": "bert"}, "The tokenizer in bert must have the 54 tokens of the network, got 65."),
        ("image_reward", {"image_reward_weights": "HPS_v2_compressed.pt"}, "must hold named tensors at the top, got epoch"),
        ("image_reward", {"image_reward_weights": "pick/model.safetensors"}, "these are no weights of ImageReward: "),
        ("hps_v2", {"hps_v2_weights": "ImageReward.pt"}, "these are no weights of a CLIP in open_clip's format: "),
    ],
)
def test_what_is_missing_is_named_before_any_image_is_made(capsys, places, tmp_path, monkeypatch, metric, changed, message):
    monkeypatch.chdir(places["hps_v2_1_weights"])
    settings = {name: value for name, value in (places | changed).items() if value is not None}
    arguments = ["--num-prompts", 2, "--device", "cpu", "--metrics", metric, *preference_flags(settings)]
    code, _, err = run(capsys, "evaluate", "--output", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "images").exists()


def test_a_tensor_that_is_missing_or_unknown_is_named_and_never_random(tmp_path):
    for name, opened, key in (
        ("hps.", open_open_clip, "visual.transformer.resblocks.1.attn.in_proj_weight"),
        ("image_reward.", open_image_reward, "mlp.layers.4.bias"),
    ):
        tensors = stored_part(name)
        file = tmp_path / f"{name}safetensors"
        save_file({other: value for other, value in tensors.items() if other != key}, file)
        with pytest.raises(ValueError, match=r"tensors of the \w+ are missing: "):
            opened(file).load()
        save_file(tensors | {"more.weight": torch.zeros(2)}, file)
        with pytest.raises(ValueError, match=r"has 1 keys that a \w+ does not have: more.weight"):
            opened(file).load()


def test_identities_are_of_content_and_names(places, tmp_path):
    def identity(**changes):
        return MeasureSettings(**places | changes).identity(["hps_v2", "image_reward"])

    first = identity()
    copy = tmp_path / "other_name.pt"
    copy.write_bytes((tmp_path.parent / places["hps_v2_weights"]).read_bytes())
    assert identity(hps_v2_weights=str(copy)) == first
    assert identity(image_reward_weights=None)["image_reward"]["weights"].startswith("THUDM/ImageReward, ")
    changed = identity(clip_h_processor=None)
    assert changed["image_reward"] == first["image_reward"]
    assert changed["hps_v2"]["weights"].endswith(", laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    assert set(PREFERENCE_SETTINGS) == set(places)


def test_cut_texts_are_warned_of(models):
    with pytest.warns(UserWarning, match=r"1 of 1 texts are longer than the 35 tokens ImageReward reads, and are cut"):
        models["image_reward"](random_images(1, size=30), ["a very long text of one letter words " * 9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models["image_reward"](random_images(1, size=30), [re.sub(r"\W", " ", "a red bird")])
