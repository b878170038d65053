"""The scripts that draw the emoji world, train its model and judge its pictures, on a few made-up icons."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_infogain import InfoGainPipeline

SCRIPTS = Path(__file__).parent.parent / "examples" / "emoji"
MODULES = ("world", "training", "classifier", "train_tokenizer", "train_model", "measure", "draw")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@pytest.fixture
def scripts(monkeypatch):
    """Imports a script as the others do, and forgets all of them afterwards."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return __import__(name)

    yield load
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(scripts, capsys, monkeypatch):
    def in_process(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return capsys.readouterr().out

    return in_process


def circle(color: str) -> dict[str, Any]:
    return {"body": f'<circle cx="8" cy="8" r="8" fill="{color}"/>'}


RED = circle("red")


def package(prefix: str, icons: dict[str, Any], **sizes: int) -> dict[str, Any]:
    return {"prefix": prefix, "icons": icons, "width": 16, "height": 16, **sizes}


def test_names_and_skin_tones_are_read_from_keys(scripts):
    parse = scripts("world").parse_icon
    icons = {"woman-cook", "woman-cook-medium-dark", "sea-dark"}
    assert parse("woman-cook-medium-dark-skin-tone", icons) == ("woman cook", "medium-dark")
    assert parse("woman-dark-skin-tone-beard", icons) == ("woman beard", "dark")
    assert parse("woman-cook-medium-dark", icons) == ("woman cook", "medium-dark")
    # without an icon that lacks it, the last word is part of the name
    assert parse("sea-dark", icons) == ("sea dark", None)
    assert parse("flag-for-flag-belize", icons) == parse("flag-for-belize", icons) == ("flag belize", None)
    assert parse("kiss-light-skin-tone-dark-skin-tone", icons) is None


def test_a_name_is_kept_if_two_sets_draw_it_and_hidden_icons_are_not(scripts):
    sets = {
        "one": package(
            "one", {"alarm-clock": circle("red"), "only-here": circle("red"), "cat": {**circle("red"), "hidden": True}}
        ),
        "two": package("two", {"alarmclock": circle("blue"), "cat": circle("blue")}),
    }
    found = scripts("world").name_pictures(sets)
    assert [(p.set, p.icon, p.name, p.caption) for p in found] == [
        ("one", "alarm-clock", "alarm clock", "alarm clock, one style"),
        ("two", "alarmclock", "alarm clock", "alarm clock, two style"),
    ]


def test_splits_hold_out_whole_names_pairs_and_triples(scripts):
    world = scripts("world")
    sets = ("one", "two", "three", "four")
    pictures = [world.Picture(s, "x", f"name {i}", tone) for i in range(300) for s in sets for tone in (None, *TONES)]
    splits = {(p.name, p.set, p.tone): world.split_of(p, 0) for p in pictures}
    unseen = {name for (name, *_), split in splits.items() if split.endswith(" unseen")}
    for name in unseen:
        assert len({split for (other, *_), split in splits.items() if other == name}) == 1
    # a pair of name and set is held out as a whole, or only skin tones of it are
    for i in range(300):
        for s in sets:
            pair = {tone: splits[f"name {i}", s, tone] for tone in (None, *TONES)}
            assert pair[None] == "train" or len(set(pair.values())) == 1
    share = {split: sum(value == split for value in splits.values()) / len(splits) for split in set(splits.values())}
    assert 0.8 < share["train"] < 0.9
    assert all(0.02 < share[split] < 0.07 for split in world.SPLITS)
    assert splits != {(p.name, p.set, p.tone): world.split_of(p, 1) for p in pictures}


def test_an_icon_that_is_not_square_is_drawn_in_the_middle(scripts):
    pytest.importorskip("resvg_py")
    world = scripts("world")
    content = package("one", {"bar": {"body": '<rect width="8" height="16" fill="#0000ff"/>', "width": 8}})
    pixels = world.draw(world.svg(content, "bar"))
    assert pixels.shape == (64, 64, 3)
    blue = (pixels == (0, 0, 255)).all(2)
    assert blue[:, 16:48].all()
    assert not blue[:, :16].any()
    assert (pixels[:, :16] == 255).all()


def test_equal_pictures_of_a_set_are_one(scripts, tmp_path):
    pytest.importorskip("resvg_py")
    for name, color in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        icons = {"cat": circle(color), "dog": circle(color)}
        (tmp_path / name / "icons.json").write_text(json.dumps(package(name, icons)), encoding="utf-8")
    pixels, pictures = scripts("world").make_world([tmp_path / "one", tmp_path / "two"], 0)
    assert [p.caption for p in pictures] == ["cat, one style", "cat, two style"]
    assert pixels[:, 32, 32].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_a_folder_without_icons_is_named(scripts, tmp_path):
    (tmp_path / "icons.json").write_text('{"prefix": "x"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"icons.json must be the `icons.json` of a package @iconify-json/NAME\."):
        scripts("world").make_world([tmp_path], 0)


def test_a_training_that_was_killed_ends_as_one_that_was_not(scripts, tmp_path):
    training = scripts("training")

    def train(path: Path, killed_at: int | None) -> list[float]:
        model = torch.nn.Linear(3, 1)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(0)

        def step(number: int) -> dict[str, float]:
            if number == killed_at:
                raise KeyboardInterrupt
            loss = model(torch.randn(4, 3, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss.item()}

        training.run_steps(path, 6, {"model": model, "optimizer": optimizer}, generator, step, save_seconds=-1)
        return model.weight.flatten().tolist()

    whole = train(tmp_path / "whole.pt", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed.pt", 3)
    assert train(tmp_path / "killed.pt", None) == whole


def test_words_of_captions_are_one_token_each(scripts, tmp_path):
    captions = ["woman cook, medium-dark skin tone, noto style", "keycap 10, fluent style"]
    tokenizer = scripts("train_model").build_tokenizer(captions, tmp_path / "merges.json")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(captions[0]).input_ids)
    words = ["woman", "cook", ",", "medium", "-", "dark", "skin", "tone", ",", "noto", "style"]
    assert tokens[1:-1] == [f"{word}</w>" for word in words]
    again = scripts("train_model").build_tokenizer([], tmp_path / "merges.json")
    assert again.get_vocab() == tokenizer.get_vocab()


def test_codes_are_the_means_of_what_is_nearest_to_them(scripts):
    tokenizer = scripts("train_tokenizer")
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(8, 5, generator=generator)
    points = (centres[:, None] + 0.1 * torch.randn(8, 50, 5, generator=generator)).flatten(0, 1)
    codes = tokenizer.k_means(points, 20, 20, generator)
    nearest = tokenizer.nearest_codes(points, codes)
    assert torch.equal(nearest, torch.cdist(points, codes).argmin(1))
    for code in nearest.unique():
        torch.testing.assert_close(codes[code], points[nearest == code].mean(0), atol=1e-4, rtol=0)
    assert (points - codes[nearest]).norm(dim=1).max() < 1


def test_a_patch_is_the_pixels_of_its_token(scripts):
    pictures = torch.arange(3 * 64 * 64).view(1, 3, 64, 64).float()
    found = scripts("train_tokenizer").patches(pictures)
    assert torch.equal(found[0, 8 * 2 + 5], pictures[0, :, 16:24, 40:48].flatten())


def made_up_world(folder: Path) -> None:
    """Twenty names in two sets, as world.py would write them: stripes of a color for the name and one for the set."""
    generator = np.random.default_rng(0)
    colors = generator.integers(0, 256, (22, 3), dtype=np.uint8)
    pixels, records = [], []
    for s in range(2):
        for n in range(20):
            pixels.append(
                np.where(np.arange(64)[:, None, None] % 16 < 8, colors[n], colors[20 + s]) * np.ones((64, 64, 1), np.uint8)
            )
            split = "choose" if (n + s) % 3 == 0 else "train"
            records.append({"set": f"set{s}", "icon": f"name-{n}", "name": f"name {n}", "tone": None, "split": split})
    np.save(folder / "pictures.npy", np.stack(pixels))
    (folder / "world.json").write_text(json.dumps({"pictures": records}), encoding="utf-8")


def test_the_scripts_train_resume_save_and_measure(run, tmp_path):
    made_up_world(tmp_path)
    small = ["--world", tmp_path, "--batch-size", 4]
    for kind in ("loss", "judge"):
        out = run("classifier.py", kind, *small, "--steps", 2)
        assert "held-out combinations: set " in out
    run("train_tokenizer.py", *small, "--k-means-steps", 2, "--steps", 2)
    tokens = torch.load(tmp_path / "tokens.pt", weights_only=True)
    assert tokens.shape == (40, 64)
    run("train_model.py", *small, "--steps", 1)
    run("train_model.py", *small, "--steps", 2)
    assert torch.load(tmp_path / "transformer.pt", weights_only=True)["step"] == 2
    pipe = InfoGainPipeline.from_pretrained(tmp_path / "model")
    assert pipe("name 3, set0 style", num_inference_steps=2).images[0].size == (64, 64)

    out = run("draw.py", "--world", tmp_path, "--output", tmp_path / "sheet.png", "--captions", 4, "--columns", 2, "--steps", 2)
    assert "name 0, set0 style; " in out
    with PIL.Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == (2 * 64, 2 * 3 * 64 + 8)

    samplers = ["--samplers", "maskgit", "pivot:entropy_bound=0.5", "--steps", 2, "--batch-size", 6]
    out = run("measure.py", "--world", tmp_path, *samplers)
    lines = (tmp_path / "measured-choose" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["sampler"] for record in records] == ["maskgit", "pivot:entropy_bound=0.5"]
    for record in records:
        assert len(record["name_right"]) == len(record["cumulative_entropies"]) == 2 * 13
        assert record["num_states"] <= 2
        assert 0 <= record["recall"] <= 1
    assert "| pivot:entropy_bound=0.5 | 2 | 2 |" in out
    # finished runs are not made again
    run("measure.py", "--world", tmp_path, *samplers)
    assert (tmp_path / "measured-choose" / "results.jsonl").read_text(encoding="utf-8").splitlines() == lines
    limits = json.loads((tmp_path / "measured-choose" / "limits.json").read_text(encoding="utf-8"))
    assert limits["real"]["Frechet"] == pytest.approx(0, abs=1e-6)
    assert limits["real"]["precision"] == limits["real"]["recall"] == 1
    assert limits["reconstructed"]["PSNR"] > 0
