from __future__ import annotations

import hashlib
import json

import pytest
from helpers.commands import run
from PIL import Image

from diffusers_infogain.demo.shapes import parse_caption

QUICK = ["--steps", "2", "--sampler", "maskgit", "--device", "cpu"]


def evaluate(capsys, folder, *arguments) -> tuple[int, str, str]:
    return run(capsys, "evaluate", "--output", folder, *QUICK, *arguments)


def test_the_demo_world_is_measured_by_its_own_means(capsys, tmp_path):
    code, out, _ = evaluate(capsys, tmp_path, "--num-prompts", 6)
    assert code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["scheduler"]["sampler"] == "maskgit"
    assert report["measured"]["features"] == report["measured"]["reference"] == "demo"
    assert report["figures"]["num_states"] == {"value": 2.0, "standard_error": None, "n": 6}
    # In the first step all prompts share the negative row.
    assert report["figures"]["num_evaluations"] == {"value": pytest.approx(2 + 7 / 6), "standard_error": None, "n": 6}
    assert report["figures"]["seconds_per_image"]["value"] > 0
    assert set(report["composition"]) == {"counting", "position", "attribute binding", "overall", "images"}
    # A Fréchet distance on other features than Inception's is not called FID.
    assert "FD (demo VQ encoder, channel means)" in report["figures"]
    assert "FID" not in (tmp_path / "report.md").read_text()
    assert {"precision", "recall", "distinct images"} <= set(report["figures"])
    assert (tmp_path / "report.md").read_text() in out
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(6))


@pytest.mark.parametrize("split", ["choose", "report", "final"])
def test_the_prompts_can_be_a_split_of_the_demo_worlds_captions(capsys, tmp_path, split):
    arguments = ["--num-prompts", 3, "--prompts", f"demo-{split}", "--metrics", "composition"]
    code, _, err = evaluate(capsys, tmp_path, *arguments)
    assert code == 0, err
    prompts = json.loads((tmp_path / "report.json").read_text())["settings"]["prompts"]
    assert [parse_caption(prompt).split for prompt in prompts] == [split] * 3


def test_genevals_metadata_in_and_genevals_folders_out(capsys, stock_repository, tmp_path):
    lines = [{"tag": "single_object", "prompt": "a bench"}, {"tag": "colors", "prompt": "a red cow"}]
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--model", stock_repository, "--prompts", prompts, "--layout", "geneval", "--num-images", 2]
    code, out, _ = evaluate(capsys, tmp_path / "out", *arguments)
    assert code == 0
    assert "NFE" in out
    folder = tmp_path / "out" / "images"
    assert [json.loads((folder / f"0000{i}" / "metadata.jsonl").read_text()) for i in (0, 1)] == lines
    assert len(list(folder.glob("*/samples/000?.png"))) == 4


def test_class_names_make_prompts(capsys, stock_repository, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"0": "tench, Tinca tinca", "1": "goldfish"}))
    arguments = ["--model", stock_repository, "--prompts", tmp_path / "classes.json", "--prompt-template", "a photo of a {}"]
    assert evaluate(capsys, tmp_path / "out", *arguments)[0] == 0
    texts = [json.loads(line)["prompt"] for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert texts == ["a photo of a tench", "a photo of a goldfish"]


def test_images_from_elsewhere_are_measured(capsys, tmp_path):
    for kind, shift in (("fake", 0), ("real", 40)):
        (tmp_path / kind).mkdir()
        for i in range(5):
            Image.effect_noise((64, 64), 50 + 10 * i + shift).convert("RGB").save(tmp_path / kind / f"{i}.png")
    arguments = ["--images", tmp_path / "fake", "--reference", tmp_path / "real", "--features", "demo"]
    code, _, _ = evaluate(capsys, tmp_path / "out", *arguments, "--metrics", "frechet", "kid", "precision_recall")
    assert code == 0
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["figures"]
    assert set(figures) == {
        "FD (demo VQ encoder, channel means)",
        "kernel distance (demo VQ encoder, channel means)",
        "precision",
        "recall",
    }
    assert figures["FD (demo VQ encoder, channel means)"]["n"] == 5
    report = (tmp_path / "out" / "report.json").read_bytes()
    for _ in range(2):  # the same measurement is the same report, another one stands beside it
        assert evaluate(capsys, tmp_path / "out", *arguments, "--metrics", "kid")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report-2.json",
        "report-2.md",
        "report.json",
        "report.md",
    ]
    assert (tmp_path / "out" / "report.json").read_bytes() == report


def test_few_images_get_a_kernel_distance_beside_the_frechet_distance(capsys, tmp_path):
    for kind, shift in (("fake", 0), ("real", 40)):
        (tmp_path / kind).mkdir()
        for i in range(30):
            Image.effect_noise((64, 64), 50 + 2 * i + shift).convert("RGB").save(tmp_path / kind / f"{i}.png")
    arguments = ["--images", tmp_path / "fake", "--reference", tmp_path / "real", "--features", "demo"]
    arguments += ["--metrics", "frechet", "fd_infinity", "--resize", "clean"]
    assert evaluate(capsys, tmp_path / "out", *arguments)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["figures"])[:2] == [
        "FD (demo VQ encoder, channel means)",
        "kernel distance (demo VQ encoder, channel means)",
    ]
    at_infinity = report["figures"]["FD∞ (demo VQ encoder, channel means)"]
    assert 0 < at_infinity["standard_error"] < at_infinity["value"]
    assert list(report["measured"]["metrics"]) == ["frechet", "kid", "fd_infinity"]
    assert report["measured"]["metrics"]["frechet"]["resize"] == "clean"


def test_published_statistics_are_named_with_their_checksum(capsys, tmp_path, monkeypatch):
    (tmp_path / "fake").mkdir()
    for i in range(3):
        Image.effect_noise((64, 64), 50 + 10 * i).convert("RGB").save(tmp_path / "fake" / f"{i}.png")
    statistics = tmp_path / "VIRTUAL_imagenet512.npz"
    images = ["--images", tmp_path / "fake", "--features", "demo"]
    assert evaluate(capsys, tmp_path / "a", *images, "--save-statistics", statistics)[0] == 0
    arguments = [*images, "--metrics", "frechet", "--reference", "adm-imagenet512"]
    code, _, err = evaluate(capsys, tmp_path / "b", *arguments)
    assert code == 2
    assert "`reference_file` must be given for adm-imagenet512, or the folder of its file in $INFOGAIN_REFERENCES" in err
    monkeypatch.setenv("INFOGAIN_REFERENCES", str(tmp_path))
    code, out, err = evaluate(capsys, tmp_path / "b", *arguments)
    assert code == 0, err
    checksum = hashlib.sha256(statistics.read_bytes()).hexdigest()
    assert f"VIRTUAL_imagenet512.npz), with the SHA-256 {checksum}, for which no checksum is published." in out
    measured = json.loads((tmp_path / "b" / "report.json").read_text())["measured"]
    assert (measured["reference"], measured["reference_sha256"]) == ("adm-imagenet512", checksum)


def test_photographs_of_any_size_are_measured_and_their_statistics_kept(capsys, tmp_path):
    for kind, shift in (("fake", 0), ("real", 40)):
        (tmp_path / kind).mkdir()
        for i in range(5):
            Image.effect_noise((70 + 9 * i, 64), 50 + 10 * i + shift).save(tmp_path / kind / f"{i}.jpg")
    statistics = tmp_path / "real.npz"
    common = ["--features", "demo", "--metrics", "frechet"]
    assert evaluate(capsys, tmp_path / "a", "--images", tmp_path / "real", *common[:2], "--save-statistics", statistics)[0] == 0
    figures = []
    for name, reference in (("b", tmp_path / "real"), ("c", statistics)):
        code, _, err = evaluate(capsys, tmp_path / name, "--images", tmp_path / "fake", "--reference", reference, *common)
        assert code == 0, err
        assert "image/s" not in err
        figures.append(json.loads((tmp_path / name / "report.json").read_text())["figures"])
    title = "FD (demo VQ encoder, channel means)"
    assert figures[0][title]["value"] == pytest.approx(figures[1][title]["value"], rel=1e-6)
    code, _, err = evaluate(
        capsys, tmp_path / "d", "--images", tmp_path / "fake", "--reference", statistics, *common, "--resize", "bilinear"
    )
    assert code == 2
    assert "must be statistics of images resized by 'bilinear'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "frechet", "--reference", "nowhere"], "nowhere is no folder of images."),
        (["--metrics", "frechet", "--reference", "nowhere.npz"], "nowhere.npz is missing."),
        (["--metrics", "clip_score", "--clip-model", "./nowhere"], "nowhere"),
        (["--images", "nowhere"], "--images is for measuring: name at least one of --metrics, or give --save-statistics."),
        (["--metrics", "fid"], "A metric must be one of composition, frechet, spatial, kid, "),
        (["--metrics", "clip_score"], "`clip_model` must be given for CLIP's score or features: a folder or a Hub id."),
        (["--metrics", "kid", "--reference", "x.npz"], "`reference` must be a folder of images for kid, got x.npz."),
        (["--images", "nowhere", "--metrics", "frechet"], "`reference` must be given for frechet: a folder of real images or"),
        (
            ["--images", "nowhere", "--metrics", "composition"],
            "The metric composition is for the demo world's captions: --prompts demo, ",
        ),
        (["--metrics", "fd_infinity"], "The metric fd_infinity needs at least 30 images, got 4."),
        (
            ["--metrics", "frechet", "--reference", "adm-imagenet-256"],
            "`reference` must be a folder, a file or a name such as adm-imagenet256, got adm-imagenet-256.",
        ),
        (["--layout", "geneval", "--num-images", "0"], "argument --num-images: must be an integer >= 1, got 0"),
    ],
)
def test_wrong_input_is_found_before_any_image_is_made(capsys, tmp_path, arguments, message):
    code, _, err = evaluate(capsys, tmp_path / "out", "--num-prompts", 4, *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out" / "images").exists()
