"""`show`: figures and films from the records of images and texts, and from running their model again."""

from __future__ import annotations

import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.commands import run

from diffusers_infogain.image_files import read_png_metadata, save_png
from diffusers_infogain.pictures import Picture

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_pipe):
    """Images of the pipeline: generated, edited by a mask, edited as a whole, and others that cannot be shown."""
    folder = tmp_path_factory.mktemp("images")
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (0, 32, 64, 64))
    mask.save(folder / "mask.png")

    def make(name, seed=0, **call):
        image = demo_pipe(generator=torch.Generator().manual_seed(seed), **call).images[0]
        image.save(folder / name)
        return image

    image = make("image.png", prompt=PROMPT)
    make("inpainted.png", 1, prompt="a red circle above a green square", image=image, mask_image=mask)
    make("like.png", 2, prompt=PROMPT, image=image, strength=0.5)
    PIL.Image.new("RGB", (8, 8)).save(folder / "plain.png")
    settings = image.settings
    save_png(image, folder / "old.png", {name: value for name, value in settings.items() if name != "trace"})
    save_png(image, folder / "damaged.png", {**settings, "trace": {**settings["trace"], "winner": []}})
    save_png(image, folder / "nameless.png", {name: value for name, value in settings.items() if name != "model"})
    save_png(image, folder / "elsewhere.png", {**settings, "model": "my-model"})
    save_png(image, folder / "silent.png", {name: value for name, value in settings.items() if name != "prompt"})
    save_png(image, folder / "seedless.png", {name: value for name, value in settings.items() if name != "seed"})
    save_png(PIL.Image.new("RGB", (64, 64)), folder / "other.png", settings)
    return folder


def show(capsys, tmp_path, *arguments):
    return run(capsys, "show", *arguments, "--output", tmp_path / "out", "--device", "cpu")


@pytest.mark.parametrize("name", ["image", "inpainted", "like"])
def test_an_image_says_itself_how_it_was_decoded(capsys, tmp_path, monkeypatch, folder, name):
    monkeypatch.setattr("diffusers_infogain.cli.show._load", lambda *_: pytest.fail("no model is needed"))
    code, out, err = show(capsys, tmp_path, folder / f"{name}.png")
    assert code == 0, err
    record = read_png_metadata(folder / f"{name}.png")
    steps = len(record["trace"]["cost"])
    assert f"{record['prompt']}\n{steps} step{'s' * (steps > 1)}, " in out
    with PIL.Image.open(tmp_path / "out" / f"{name}-decoding.png") as figure:
        assert figure.width > 800
    assert f"Written: {tmp_path}/out/{name}-decoding.png." in out


def test_what_an_image_records_is_what_its_trace_says(folder, demo_pipe):
    trace = demo_pipe(PROMPT, generator=torch.Generator().manual_seed(0)).trace
    record = read_png_metadata(folder / "image.png")["trace"]
    assert record == json.loads(json.dumps(trace.of_sample().record()))
    assert record["decoded_at"] == trace.decoded_at[0].tolist()
    assert len(json.dumps(record)) < 1500


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_model_is_run_again_for_a_film(capsys, tmp_path, folder, suffix):
    code, out, err = show(capsys, tmp_path, folder / "image.png", "--film", suffix, "--size", 128)
    assert code == 0, err
    assert "another image" not in err
    with PIL.Image.open(tmp_path / "out" / f"image-decoding.{suffix}") as film:
        assert film.n_frames == len(read_png_metadata(folder / "image.png")["trace"]["cost"]) + 1
        film.seek(film.n_frames - 1)
        last = np.array(film.convert("RGB")).astype(int)
    with PIL.Image.open(folder / "image.png") as image:
        assert np.abs(last - np.array(image.convert("RGB").resize((128, 128), PIL.Image.Resampling.NEAREST))).mean() < 3
    assert f"image-decoding.png and {tmp_path}/out/image-decoding.{suffix}." in out


@pytest.mark.parametrize("flags", [("inpainted.png", "--mask", "mask.png"), ("like.png",)])
def test_an_edit_is_made_again_from_its_input(capsys, tmp_path, folder, flags):
    name, *rest = flags
    mask = [folder / value if value.endswith("png") else value for value in rest]
    code, _, err = show(capsys, tmp_path, folder / name, "--again", "--image", folder / "image.png", *mask)
    assert code == 0
    assert "another image" not in err
    code, _, err = show(capsys, tmp_path, folder / name, "--again")
    assert code == 2
    assert f"{name} is an edit of an image that it does not hold: give that by --image (and --mask)." in err


def test_edits_of_generate_find_their_input_beside_them(capsys, tmp_path, folder):
    edit = ["--image", folder / "image.png", "--mask", folder / "mask.png", "--output", tmp_path, "--device", "cpu"]
    assert run(capsys, "generate", "a red circle", *edit)[0] == 0
    (made,) = tmp_path.glob("*.png")
    code, _, err = show(capsys, tmp_path, made, "--again")
    assert code == 2
    assert "is an edit with 'image.png', which is neither beside it nor in this folder: give it by --image." in err
    for name in ("image.png", "mask.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    code, _, err = show(capsys, tmp_path, made, "--again")
    assert code == 0, err
    assert "another image" not in err


def test_images_of_the_commands_are_shown(capsys, tmp_path):
    assert run(capsys, "generate", PROMPT, "--seed", 5, "--output", tmp_path / "g", "--device", "cpu")[0] == 0
    assert run(capsys, "generate", PROMPT, "--seed", 5, "--output", tmp_path / "g", "--device", "cpu")[0] == 0
    evaluate = ["--num-prompts", 2, "--metrics", "--output", tmp_path / "e", "--device", "cpu"]
    assert run(capsys, "evaluate", *evaluate)[0] == 0
    (generated,) = (tmp_path / "g").glob("*.png")
    evaluated = sorted((tmp_path / "e" / "images").glob("*.png"))
    assert len(evaluated) == 2
    for path in (generated, *evaluated):
        code, _, err = show(capsys, tmp_path, path, "--again")
        assert code == 0, err
        assert "another image" not in err
    assert "trace" not in (tmp_path / "e" / "images.jsonl").read_text()


def test_images_of_comparisons_are_drawn_from_their_records_only(capsys, tmp_path):
    compare = ["--samplers", "confidence", "--steps", 2, "--num-prompts", 1, "--seeds", 0, "--metrics"]
    assert run(capsys, "compare", *compare, "--output", tmp_path / "c", "--device", "cpu")[0] == 0
    (path,) = (tmp_path / "c" / "runs").glob("*/images/*.png")
    assert show(capsys, tmp_path, path)[0] == 0
    code, _, err = show(capsys, tmp_path, path, "--again")
    assert code == 2
    assert "is of a comparison, which does not record all arguments of its calls: without --again and --film its own" in err


def test_another_image_is_told(capsys, tmp_path, folder):
    code, _, err = show(capsys, tmp_path, folder / "other.png", "--again")
    assert code == 0
    assert re.search(r"The model made another image than .*other.png this time \(100.0 % of the pixels differ\): other", err)
    record = read_png_metadata(folder / "image.png")
    Picture.of(PIL.Image.new("RGB", (8, 8)), {**record, "device": "cuda", "weights": "0"}).save(tmp_path / "small.png")
    code, _, err = show(capsys, tmp_path, tmp_path / "small.png", "--again")
    assert code == 0
    reasons = "it was made on cuda, now it ran on cpu, and the weights of the model are others."
    assert f"this time (their sizes differ): {reasons}" in err


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("plain.png", (), "plain.png does not say how it was made: it has no text chunk 'infogain'."),
        ("none.png", (), "none.png is missing."),
        ("old.png", (), "old.png does not record how it was decoded: --again finds out by running the model again."),
        ("damaged.png", (), "The field `trace` in the text chunk of .*damaged.png is damaged: its lists do not fit each other."),
        ("nameless.png", ("--again",), "nameless.png does not name the model that made it: give that by --model."),
        (
            "elsewhere.png",
            ("--again",),
            "was made by a model in a folder 'my-model', which is not here: give that folder by --model.",
        ),
        ("silent.png", ("--again",), "silent.png does not record its `prompt`, without which it cannot be made again."),
        ("seedless.png", ("--again",), "The text chunk of .*seedless.png must have the field `seed`."),
        ("image.png", ("--again", "--model", "demo-text"), "'demo-text' is a text model"),
        ("texts.jsonl", ("--film", "gif"), "--film is for images, and .*texts.jsonl holds texts."),
        ("texts.jsonl", (), "texts.jsonl is missing."),
    ],
)
def test_what_cannot_be_shown_gets_one_sentence(capsys, tmp_path, folder, name, flags, message):
    code, out, err = show(capsys, tmp_path, folder / name, *flags)
    assert code == 2
    assert not out
    assert re.search(message, err)
    assert err.strip().count("\n") == 0 or "Loading" in err


def test_old_images_are_shown_by_running_their_model(capsys, tmp_path, folder):
    code, _, err = show(capsys, tmp_path, folder / "old.png", "--again")
    assert code == 0
    assert "another image" not in err


def test_texts_of_a_file_are_shown(capsys, tmp_path, monkeypatch):
    path = tmp_path / "texts.jsonl"
    assert run(capsys, "text", "M07*12=________", "S1_2_3_4________", "--output", path, "--device", "cpu")[0] == 0
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    code, out, err = show(capsys, tmp_path, path, "--line", 2)
    assert code == 0, err
    assert "another text" not in err
    assert out.splitlines()[1] == texts[1]
    assert out.splitlines()[2].startswith("step 1: ")
    page = (tmp_path / "out" / "texts-2-decoding.html").read_text()
    assert page.startswith("<!doctype html>")
    code, _, err = show(capsys, tmp_path, path, "--line", 3)
    assert code == 2
    assert f"--line must be at most 2, the number of texts in {path}, got 3." in err
    path.write_text(path.read_text().replace(texts[1], texts[1][:-1] + "9"))
    assert "wrote another text than line 2 of" in show(capsys, tmp_path, path, "--line", 2)[2]
    path.with_name("texts.jsonl.run.json").unlink()
    assert "texts.jsonl.run.json, which says how" in show(capsys, tmp_path, path)[2]


def test_the_text_command_shows_and_writes_pages(capsys, tmp_path, monkeypatch):
    prompts = ["M07*12=________", "M07*12=00010100"]
    code, out, _ = run(capsys, "text", *prompts, "--show", "--html", tmp_path / "a.html", "--device", "cpu")
    assert code == 0
    assert "step 1: '0' at 7" in out
    assert out.endswith("at 14\n\n\n"), "nothing was added to a prompt without masks"
    page = (tmp_path / "a.html").read_text()
    assert page.count('class="ig-text"') == 1
    assert "<p></p>" in page
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[48;5;" in run(capsys, "text", *prompts, "--show", "--device", "cpu")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(capsys, "text", *prompts, "--show", "--device", "cpu")[1]
    code, _, err = run(capsys, "text", *prompts, "--show", "--output", tmp_path / "t.jsonl", "--device", "cpu")
    assert code == 2
    assert "--show and --html are for texts that are printed: `diffusers-infogain show` shows one of --output." in err
