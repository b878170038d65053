from __future__ import annotations

import json
import os
import re

import pytest
from helpers.commands import run
from helpers.metrics import random_images
from helpers.preference import preference_flags, save_preference_models
from PIL import Image

from diffusers_infogain.evaluation import runs
from diffusers_infogain.evaluation.prompts import Prompt, read_prompts, requests
from diffusers_infogain.image_files import read_png_metadata


def dpg_prompts(folder):
    folder.mkdir()
    for name, text in (("0", "a fox.\n"), ("10", "a dog_and a cat"), ("partiprompts2", " two\nlines ")):
        (folder / f"{name}.txt").write_text(text)
    (folder / "notes.md").write_text("not a prompt")
    return read_prompts(folder)


def squares(prompts, seeds):
    """Images that tell their seed."""
    return [Image.new("RGB", (6, 6), (seed, 0, 9)) for seed in seeds], [{} for _ in seeds]


def made(every, folder, make=squares):
    runs.make_missing(every, make, folder, 3)
    return runs.finish(every, folder)


def test_a_folder_of_texts_is_prompts_with_names(tmp_path):
    assert dpg_prompts(tmp_path / "prompts") == [
        Prompt("a fox.", {"name": "0", "prompt": "a fox."}),
        Prompt("a dog_and a cat", {"name": "10", "prompt": "a dog_and a cat"}),
        Prompt("two\nlines", {"name": "partiprompts2", "prompt": "two\nlines"}),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no prompts"):
        read_prompts(tmp_path / "empty")
    (tmp_path / "empty" / "7.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"7.txt holds no prompt\."):
        read_prompts(tmp_path / "empty")


def test_dpg_has_a_grid_of_four_for_every_prompt_under_its_name(tmp_path):
    prompts = dpg_prompts(tmp_path / "prompts")
    every = requests(prompts, num_images=4, seed=20, layout="dpg")
    images = made(every, tmp_path)
    # As its script reads: all files of the folder, names up to the first dot, four squares of the resolution, row by row.
    files = os.listdir(tmp_path / "grids")
    assert sorted(file.split(".")[0] for file in files) == ["0", "10", "partiprompts2"]
    for number, name in enumerate(("0", "10", "partiprompts2")):
        with Image.open(tmp_path / "grids" / f"{name}.png") as grid:
            assert grid.size == (12, 12)
            crops = [grid.crop(box) for box in ((0, 0, 6, 6), (6, 0, 12, 6), (0, 6, 6, 12), (6, 6, 12, 12))]
        assert [crop.getcolors() for crop in crops] == [[(36, (20 + 4 * number + i, 0, 9))] for i in range(4)]
        own = images[4 * number : 4 * number + 4]
        assert [image.path.parent.name for image in own] == [name] * 4
        found = {"prompt": prompts[number].text, "seeds": [image.request.seed for image in own]}
        assert read_png_metadata(tmp_path / "grids" / f"{name}.png") == found


def test_grids_are_made_again_only_where_they_are_missing_or_damaged(tmp_path):
    every = requests(dpg_prompts(tmp_path / "prompts"), num_images=4, layout="dpg")
    made(every, tmp_path)
    grids = sorted((tmp_path / "grids").iterdir())
    before = [path.read_bytes() for path in grids]
    grids[0].unlink()
    grids[1].write_bytes(before[1][:50])
    kept = grids[2].stat().st_ino
    made(every, tmp_path)
    assert [path.read_bytes() for path in grids] == before
    assert grids[2].stat().st_ino == kept


def test_a_grid_takes_squares_only(tmp_path):
    every = requests(dpg_prompts(tmp_path / "prompts")[:1], num_images=4, layout="dpg")
    with pytest.raises(
        ValueError, match=r"The layout dpg must have square images of one size, got .*0.png and others of 8 x 6\."
    ):
        made(every, tmp_path, lambda prompts, seeds: ([Image.new("RGB", (8, 6)) for _ in seeds], [{} for _ in seeds]))


def test_t2i_compbench_has_its_prompts_in_the_names_and_a_number_that_counts_all(tmp_path):
    texts = ["a green bench and a blue bowl", "The white clock with a red roof reads 11.44."]
    every = requests([Prompt(text) for text in texts], num_images=3, layout="t2i_compbench")
    made(every, tmp_path)
    # As its scripts read: prompts before the first underscore, sorted by the number after it.
    names = sorted(os.listdir(tmp_path / "images" / "samples"), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert names[4] == "The white clock with a red roof reads 11.44._000004.png"
    assert [name.split("_")[0] for name in names] == [text for text in texts for _ in range(3)]
    assert [int(name.split(".png")[0].split("_")[1]) for name in names] == list(range(6))
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["samples"]


@pytest.mark.parametrize(
    ("layout", "prompts", "count", "message"),
    [
        ("plains", [Prompt("a")], 1, "`layout` must be one of plain, geneval, dpg, t2i_compbench, got 'plains'."),
        ("dpg", [Prompt("a", {"name": "1"})], 1, "`num_images` must be 4 for the layout dpg, a grid for every prompt, got 1."),
        ("dpg", [Prompt("a")], 4, "`prompts` must be a folder of .txt files for the layout dpg, whose pictures have their names"),
        ("dpg", [Prompt("a", {"name": "../b"})], 4, "without dots, got 'a' named '../b'."),
        (
            "dpg",
            [Prompt("a", {"name": "1"}), Prompt("b", {"name": "1"})],
            4,
            "`prompts` must have a name each for the layout dpg",
        ),
        ("t2i_compbench", [Prompt("a"), Prompt("a_b")], 1, "no underscore, no line break and no '.png', got 'a_b'."),
        ("t2i_compbench", [Prompt("../a")], 1, "names files after prompts, which must have at most 240 bytes, no slash"),
        ("t2i_compbench", [Prompt("é" * 121)], 1, "at most 240 bytes"),
    ],
)
def test_a_layout_that_cannot_hold_the_prompts_says_so(layout, prompts, count, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        requests(prompts, count, layout=layout)


def test_evaluate_writes_the_layouts_and_measures_their_images_by_their_prompts(capsys, tmp_path):
    places = preference_flags(save_preference_models(tmp_path / "networks"))
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("0", "a red circle"), ("a1", "two blue squares")):
        (folder / f"{name}.txt").write_text(text)
    flags = ["--steps", 2, "--sampler", "maskgit", "--device", "cpu", "--layout", "dpg"]
    code, _, err = run(capsys, "evaluate", "--prompts", folder, "--output", tmp_path / "out", "--num-images", 1, *flags)
    assert code == 2
    assert "`num_images` must be 4 for the layout dpg" in err
    assert not (tmp_path / "out").exists()
    flags += ["--prompts", folder, "--num-images", 4, "--metrics", "image_reward", *places]
    code, _, err = run(capsys, "evaluate", "--output", tmp_path / "out", *flags)
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "out" / "grids").iterdir()) == ["0.png", "a1.png"]
    reports = [json.loads((tmp_path / "out" / "report.json").read_text())]
    common = ["--images", tmp_path / "out" / "images", "--metrics", "image_reward", *places, "--device", "cpu"]
    for number, more in enumerate(([], ["--prompts", folder, "--num-images", 4])):
        code, _, err = run(capsys, "evaluate", "--output", tmp_path / f"again{number}", *common, *more)
        assert code == 0, err
        reports.append(json.loads((tmp_path / f"again{number}" / "report.json").read_text()))
    figures = [report["figures"]["ImageReward"] for report in reports]
    for figure in figures[1:]:
        assert figure == {name: pytest.approx(value, rel=1e-4) for name, value in figures[0].items()}
    assert reports[1]["settings"]["prompts"] == ["a red circle"] * 4 + ["two blue squares"] * 4
    code, _, err = run(capsys, "evaluate", "--output", tmp_path / "b", *common, "--prompts", folder)
    assert code == 2
    assert "--prompts and --num-images must make as many as there are images, 8, got 2." in err
    other = random_images(1, size=9)[0].permute(1, 2, 0).numpy()
    Image.fromarray(other).save(tmp_path / "out" / "images" / "0" / "9.png")
    code, _, err = run(capsys, "evaluate", "--output", tmp_path / "b", *common)
    assert code == 2
    assert re.search(r"--prompts must be given for image_reward: .*9.png does not say what it was made of\.", err)
