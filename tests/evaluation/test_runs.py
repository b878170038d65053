from __future__ import annotations

import json
import re
import threading
from functools import partial

import pytest
import torch
from PIL import Image

import diffusers_infogain
from diffusers_infogain.evaluation import runs
from diffusers_infogain.evaluation.prompts import Prompt, requests
from diffusers_infogain.processes import Processes

PROMPTS = [Prompt("red"), Prompt("green"), Prompt("blue")]


class Maker:
    """Images whose color tells prompt and seed, and which say what batch they were made in."""

    def __init__(self, fail_after: int | None = None):
        self.batches: list[list[int]] = []
        self.fail_after = fail_after

    def __call__(self, prompts, seeds):
        if self.fail_after is not None and len(self.batches) == self.fail_after:
            raise RuntimeError("out of memory")
        self.batches.append(seeds)
        images = [Image.new("RGB", (4, 3), (len(prompt), seed, 0)) for prompt, seed in zip(prompts, seeds, strict=True)]
        return images, [{"batch": seeds} for _ in seeds]


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in (folder / "images").rglob("*.png")}


def test_only_batches_with_missing_images_are_made_and_finished_files_stay(tmp_path):
    every = requests(PROMPTS, num_images=2)
    whole = Maker()
    (tmp_path / "whole").mkdir()
    runs.make_missing(every, whole, tmp_path / "whole", 2)
    assert whole.batches == [[0, 1], [2, 3], [4, 5]]
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(RuntimeError, match="out of memory"):
        runs.make_missing(every, Maker(fail_after=2), broken, 2)
    kept = contents(broken)
    assert len(kept) == 4
    (broken / "images" / "000002.png").unlink()
    again = Maker()
    runs.make_missing(every, again, broken, 2)
    assert again.batches == [[2, 3], [4, 5]]
    assert contents(broken) == contents(tmp_path / "whole")


def test_processes_share_out_whole_batches(tmp_path):
    every, makers, store = requests(PROMPTS, num_images=3), [Maker(), Maker()], torch.distributed.HashStore()
    shares = [Processes(index, 2, store) for index in range(2)]
    run = partial(runs.make_missing, every, folder=tmp_path, batch_size=2)
    other = threading.Thread(target=run, kwargs={"make": makers[1], "processes": shares[1]})
    other.start()
    run(make=makers[0], processes=shares[0])
    assert len(list((tmp_path / "images").iterdir())) == 9  # though the other process may still be running
    other.join(10)
    assert sorted(makers[0].batches + makers[1].batches) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert len(runs.finish(every, tmp_path)) == 9
    assert runs.read_timing(tmp_path).seconds_per_image > 0


def test_a_damaged_image_is_named_and_made_again(tmp_path, capsys):
    every = requests(PROMPTS)
    runs.make_missing(every, Maker(), tmp_path, 3)
    path = tmp_path / "images" / "000001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=re.escape(f"1 of 3 images cannot be read: {path} (damaged).")):
        runs.finish(every, tmp_path)
    runs.make_missing(every, Maker(), tmp_path, 3)
    assert f"{path} is damaged and is made again." in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_missing_images_are_named(tmp_path):
    every = requests(PROMPTS)
    with pytest.raises(ValueError, match=r"3 of 3 images cannot be read: .*000000.png \(missing\), .*000001.png \(missing\)"):
        runs.finish(every, tmp_path)


def test_the_list_of_images_says_how_each_was_made(tmp_path):
    every = requests([Prompt("a", {"prompt": "a", "tag": "colors"})])
    runs.make_missing(every, Maker(), tmp_path, 1)
    images = runs.finish(every, tmp_path)
    assert images[0].metadata == {"prompt": "a", "seed": 0, "batch": [0]}
    line = json.loads((tmp_path / "images.jsonl").read_text())
    expected = {"file": "000000.png", "prompt": "a", "seed": 0, "batch": [0], "metadata": {"prompt": "a", "tag": "colors"}}
    assert line == expected


def test_genevals_folders_hold_the_line_of_their_prompt(tmp_path):
    line = {"tag": "single_object", "prompt": "a bench", "include": []}
    every = requests([Prompt("a bench", line), Prompt("b")], num_images=2, layout="geneval")
    runs.make_missing(every, Maker(), tmp_path, 4)
    runs.finish(every, tmp_path)
    folder = tmp_path / "images"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        *("00000/metadata.jsonl", "00000/samples/0000.png", "00000/samples/0001.png"),
        *("00001/metadata.jsonl", "00001/samples/0000.png", "00001/samples/0001.png"),
    ]
    assert json.loads((folder / "00000/metadata.jsonl").read_text()) == line
    assert json.loads((folder / "00001/metadata.jsonl").read_text()) == {"prompt": "b"}


def test_another_run_is_not_mixed_into_a_folder(tmp_path):
    runs.check_settings(tmp_path, {"steps": 8, "scheduler": {"position_temperature": (2.0, 0.0)}})
    runs.check_settings(tmp_path, {"steps": 8, "scheduler": {"position_temperature": (2.0, 0.0)}})
    with pytest.raises(ValueError, match="holds a run with another `steps`: 8 there, 16 now"):
        runs.check_settings(tmp_path, {"steps": 16, "scheduler": {"position_temperature": (2.0, 0.0)}})


def test_the_prompt_that_differs_is_named(tmp_path):
    prompts = ["a red circle", "b" * 200 + " left of a square", "c"]
    runs.check_settings(tmp_path, {"prompts": prompts})
    changed = [prompts[0], "b" * 200 + " right of a square", "c"]
    expected = r'another `prompts` number 2: \.\.\.b+ left of a square" there, \.\.\.b+ right of a square" now'
    with pytest.raises(ValueError, match=expected):
        runs.check_settings(tmp_path, {"prompts": changed})
    with pytest.raises(ValueError, match="holds a run with another number of `prompts`: 3 there, 2 now"):
        runs.check_settings(tmp_path, {"prompts": prompts[:2]})


def test_settings_count_to_the_last_digit(tmp_path):
    runs.check_settings(tmp_path, {"guidance_scale": 1.2000001})
    with pytest.raises(ValueError, match=r"`guidance_scale`: 1\.2000001 there, 1\.2000002 now"):
        runs.check_settings(tmp_path, {"guidance_scale": 1.2000002})


def test_another_version_is_another_run(tmp_path, monkeypatch):
    runs.check_settings(tmp_path, {"steps": 8})
    monkeypatch.setattr(diffusers_infogain, "__version__", "99")
    with pytest.raises(ValueError, match=r'another `version`: ".*" there, "99" now'):
        runs.check_settings(tmp_path, {"steps": 8})


def test_an_image_of_another_run_is_not_overwritten(tmp_path):
    runs.make_missing(requests([Prompt("a")]), Maker(), tmp_path, 1)
    path = tmp_path / "images" / "000000.png"
    before = path.read_bytes()
    for other, message in [
        (requests([Prompt("b")]), 'its `prompt` is "a", that of the run is "b"'),
        (requests([Prompt("a")], seed=1), "its `seed` is 0, that of the run is 1"),
    ]:
        for go in (lambda every: runs.make_missing(every, Maker(), tmp_path, 1), lambda every: runs.finish(every, tmp_path)):
            with pytest.raises(ValueError, match=re.escape(f"{path} is not of this run: {message}.")):
                go(other)
    assert path.read_bytes() == before


def test_a_png_without_its_end_is_made_again(tmp_path):
    every = requests(PROMPTS)
    runs.make_missing(every, Maker(), tmp_path, 3)
    path = tmp_path / "images" / "000001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    runs.make_missing(every, Maker(), tmp_path, 3)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "must hold a JSON object, got int."),
        ('{"images": "x"}', 'must have int in its field `images`, got "x".'),
        ('{"images": 1, "seconds": null}', "must have float in its field `seconds`, got null."),
        ("{", "is not JSON: "),
    ],
)
def test_other_timings_are_named(line, message, tmp_path):
    (tmp_path / "timing-0.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"Line 1 of {tmp_path}/timing-0.jsonl {message}")):
        runs.read_timing(tmp_path)


def test_a_run_goes_on_behind_a_cut_record_of_its_timing(tmp_path):
    line = json.dumps({"images": 2, "seconds": 3.0, "peak_memory": None})
    (tmp_path / "timing-0.jsonl").write_text(line + "\n" + line[:9])
    runs.make_missing(requests(PROMPTS), Maker(), tmp_path, 3)
    records = [json.loads(line) for line in (tmp_path / "timing-0.jsonl").read_text().splitlines()]
    assert [record["images"] for record in records] == [2, 3]


def test_a_record_cut_short_by_a_kill_is_left_out_of_the_timing(tmp_path):
    line = json.dumps({"images": 2, "seconds": 3.0, "peak_memory": 5})
    (tmp_path / "timing-0.jsonl").write_text(line + "\n" + line[:9])
    (tmp_path / "timing-1.jsonl").write_text(json.dumps({"images": 2, "seconds": 1.0, "peak_memory": None}) + "\n")
    assert runs.read_timing(tmp_path) == runs.Timing(1.0, 5)
    with pytest.raises(ValueError, match="holds no timing records"):
        runs.read_timing(tmp_path / "nothing")
