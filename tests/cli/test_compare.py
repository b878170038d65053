from __future__ import annotations

import json
import re
import shutil
import sys

import PIL.Image
import pytest
from helpers import metrics  # noqa: F401, so that metrics can be imported without torchvision
from helpers.commands import run

from diffusers_infogain import cli, load
from diffusers_infogain.evaluation import sample_sheet

ARGUMENTS = ["--num-prompts", "4", "--steps", "2", "--seeds", "0", "1", "--device", "cpu", "--num-candidates", "2", "3"]


def compare(capsys, folder, *arguments) -> tuple[int, str, str]:
    return run(capsys, "compare", "--output", folder, *ARGUMENTS, *arguments)


def test_a_comparison_writes_figures_table_plots_and_images_and_makes_only_what_is_missing(capsys, tmp_path):
    folder = tmp_path / "out"
    code, out, err = compare(capsys, folder, "--samplers", "maskgit", "info_gain:gain_reduction=mean")
    assert code == 0, err
    results = json.loads((folder / "results.json").read_text())
    assert len(results["runs"]) == 6
    assert [(group["sampler"], group["num_candidates"], group["seeds"]) for group in results["summary"]] == [
        ("maskgit", None, [0, 1]),
        ("info_gain:gain_reduction=mean", 2, [0, 1]),
        ("info_gain:gain_reduction=mean", 3, [0, 1]),
    ]
    for group in results["summary"]:
        assert group["figures"]["right"]["n"] == 8
    run = results["runs"][-1]
    assert run["scheduler"]["gain_reduction"] == "mean"
    assert run["num_states"] - 1 <= 3
    assert run["num_states"] < run["num_evaluations"] < 2 * run["num_states"]
    assert len(run["right"]) == len(run["cumulative_entropies"]) == 4
    assert "| 2 | info_gain:gain_reduction=mean, N 3 |" in (folder / "table.md").read_text()
    assert "accuracy (%)" in out
    plots = {"pareto_rows.png", "pareto_calls.png", "quality_entropy.png", "decisions.png", "entropy_2_steps.png"}
    assert {*plots, "samples.jpg"} <= {path.name for path in folder.iterdir()}
    images = sorted((folder / "runs").glob("*/images/*.png"))
    assert len(images) == 24

    # What is in results.json is not made again, even when its images are gone.
    shutil.rmtree(folder / "runs")
    code, _, _ = compare(capsys, folder, "--samplers", "maskgit", "uniform")
    assert code == 0
    assert {path.name[:7] for path in (folder / "runs").iterdir()} == {"uniform"}
    again = json.loads((folder / "results.json").read_text())
    assert again["runs"][:6] == results["runs"]
    assert [group["sampler"] for group in again["summary"]] == ["maskgit", "uniform"]
    code, out, _ = compare(capsys, folder, "--samplers", "maskgit", "--everything", "--report", tmp_path / "report")
    assert code == 0
    assert "| 2 | uniform |" in out
    assert "| 2 | info_gain:gain_reduction=mean, N 3 |" in (tmp_path / "report" / "table.md").read_text()


def test_runs_measured_in_another_way_are_measured_again(capsys, tmp_path):
    for name, sigma in (("a", 20), ("b", 120)):
        (tmp_path / name).mkdir()
        for i in range(4):
            PIL.Image.effect_noise((64, 64), sigma + i).convert("RGB").save(tmp_path / name / f"{i}.png")

    def figures(folder, *arguments):
        code, _, err = compare(capsys, folder, "--seeds", 0, "--metrics", *arguments)
        assert code == 0, err
        runs = json.loads((folder / "results.json").read_text())["runs"]
        return {run["sampler"]: {name: one["figures"] for name, one in run["metrics"].items()} for run in runs}

    both = ["--samplers", "maskgit", "uniform", "--reference"]
    alone = figures(tmp_path / "alone", "frechet", *both, tmp_path / "b")
    first = figures(tmp_path / "out", "frechet", "diversity", *both, tmp_path / "a")
    images = {path: path.read_bytes() for path in (tmp_path / "out").rglob("0*.png")}
    again = figures(tmp_path / "out", "frechet", "--samplers", "maskgit", "--reference", tmp_path / "b", "--everything")
    assert again == {name: {**first[name], **alone[name]} for name in first}  # what does not depend on the reference stays
    assert {path: path.read_bytes() for path in images} == images


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "results.json must have the field `runs`."),
        ("[]", "results.json must hold a JSON object, got list."),
        ('{"runs": 5}', "results.json must have a list of object in its field `runs`, got 5."),
        ('{"runs": [{}]}', "Run 1 of {path} must have the field `sampler`."),
    ],
)
def test_results_of_another_shape_are_named(capsys, tmp_path, content, message, compared):
    (tmp_path / "run.json").write_bytes((compared / "run.json").read_bytes())
    (tmp_path / "results.json").write_text(content)
    code, _, err = compare(capsys, tmp_path, "--samplers", "maskgit", "--metrics", "composition")
    assert code == 2
    assert message.format(path=tmp_path / "results.json") in err
    assert (tmp_path / "results.json").read_text() == content


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    flags = ["--samplers", "maskgit", "--seeds", "0", "--metrics", "composition"]
    assert cli.main(["compare", "--output", str(folder), *ARGUMENTS, *flags]) == 0
    return folder


def test_guidance_scales_that_differ_in_the_last_digit_are_two_runs(capsys, tmp_path):
    flags = ["--samplers", "maskgit", "--seeds", 0, "--metrics", "composition", "--guidance-scales", 1.2000001, 1.2000002]
    assert compare(capsys, tmp_path, *flags)[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert [group["guidance_scale"] for group in summary] == [1.2000001, 1.2000002]


def test_a_sampler_may_say_how_it_is_guided(capsys, tmp_path):
    samplers = [
        "maskgit",
        "maskgit:guidance_scale=3,guidance_interval=0.5:1",
        "maskgit:guidance_scale=3,guidance_schedule=linear",
    ]
    assert compare(capsys, tmp_path, "--samplers", *samplers, "--seeds", 0, "--metrics", "composition")[0] == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert {run["sampler"]: run["guidance_scale"] for run in runs} == dict(zip(samplers, (1.2, 3, 3), strict=True))
    assert len({tuple(run["cumulative_entropies"]) for run in runs}) == 3


def test_default_is_what_the_pipeline_does(capsys, tmp_path):
    arguments = ["--num-prompts", "2", "--steps", "2", "--seeds", "0", "--device", "cpu", "--samplers", "default", "paper"]
    assert cli.main(["compare", "--output", str(tmp_path), *arguments, "--metrics", "composition"]) == 0
    runs = {run["sampler"]: run for run in json.loads((tmp_path / "results.json").read_text())["runs"]}
    own = json.loads(load("demo").scheduler.to_json_string())
    assert runs["default"]["scheduler"] == {name: value for name, value in own.items() if not name.startswith("_")}
    assert (runs["default"]["num_candidates"], runs["paper"]["num_candidates"]) == (4, 8)


def test_seeds_are_other_noise_on_the_same_prompts(capsys, tmp_path):
    compare(capsys, tmp_path, "--samplers", "maskgit")
    first, second = sorted((tmp_path / "runs").glob("*/images.jsonl"))
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in (first, second)]
    assert [line["prompt"] for line in lines[0]] == [line["prompt"] for line in lines[1]]
    assert [line["seed"] for line in lines[0]] == [0, 1, 2, 3]
    assert [line["seed"] for line in lines[1]] == [100_000, 100_001, 100_002, 100_003]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samplers", "nicest"], "A sampler must be one of info_gain, lookum,"),
        (["--samplers", "maskgit:token_temperature=-1"], "`token_temperature` must be a number >= 0, got -1."),
        (["--samplers", "maskgit:speed=3"], "got 'speed' in 'maskgit:speed=3'."),
        (["--num-prompts", "0"], "argument --num-prompts: must be an integer >= 1, got 0"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--metrics", "caption_variety"], "--num-images must be at least 2 for the metric caption_variety, got 1."),
    ],
)
def test_wrong_input_ends_with_one_sentence(capsys, tmp_path, arguments, message):
    code, _, err = compare(capsys, tmp_path, *arguments)
    assert code == 2
    assert re.search(re.escape(message), err.splitlines()[-1])


def test_two_images_of_a_prompt_have_variety(capsys, tmp_path):
    flags = ["--num-images", 2, "--samplers", "maskgit", "--seeds", 0]
    code, out, err = compare(capsys, tmp_path, *flags)
    assert code == 0, err
    header, _, row = (line.strip("| ").split(" | ") for line in out.splitlines()[:3])
    figures = dict(zip(header, row, strict=True))
    assert float(figures["variety within a caption"]) > 0
    assert "energy distance within a caption" in figures


def test_samples_are_put_side_by_side(capsys, tmp_path, monkeypatch):
    """A column for each configuration, a row for each prompt: the first image at the first seed, framed as it was judged."""
    sheets = []

    def grid(columns, rows, **more):
        sheets.append((columns, rows))
        return PIL.Image.new("RGB", (8, 8))

    monkeypatch.setattr(sample_sheet, "labelled_grid", grid)
    flags = ["--num-images", 2, "--samplers", "maskgit", "paper", "--num-candidates", 2, "--grid", 3, "--metrics", "composition"]
    code, _, err = compare(capsys, tmp_path, *flags)
    assert code == 0, err
    ((columns, rows),) = sheets
    (first, second) = (name.replace("\u00a0", " ") for name in columns)
    assert re.fullmatch(r"MaskGIT, 2 steps: [\d.]+ NFE, [\d.]+ s", first)
    assert second.startswith("lookahead as in the paper, N = 2, 2 steps: ")
    runs = {run["sampler"]: run for run in json.loads((tmp_path / "results.json").read_text())["runs"] if run["seed"] == 0}
    prompts = [line["prompt"] for line in lines_of(tmp_path / "runs" / "maskgit-steps2-g1.2-seed0" / "images.jsonl")]
    assert len(rows) == 3
    for number, row in enumerate(rows):
        assert row.lines == [prompts[2 * number]]
        for sampler, name, cell in zip(("maskgit", "paper"), ("maskgit-steps2", "paper-steps2-n2"), row.cells, strict=True):
            path = tmp_path / "runs" / f"{name}-g1.2-seed0" / "images" / f"{2 * number:06d}.png"
            assert cell.image.tobytes() == PIL.Image.open(path).convert("RGB").tobytes()
            assert cell.right == (runs[sampler]["right"][2 * number] == "1")
    shutil.rmtree(tmp_path / "runs" / "maskgit-steps2-g1.2-seed0")
    assert compare(capsys, tmp_path, *flags)[0] == 0
    assert [len(columns) for columns, _ in sheets] == [2, 1]  # what was removed is left out
    assert compare(capsys, tmp_path, *flags, "--grid", 0)[0] == 0
    assert len(sheets) == 2


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_negative_prompt_is_a_setting_of_the_comparison(capsys, tmp_path):
    flags = ["--samplers", "maskgit", "--seeds", 0, "--metrics", "--grid", 0]
    images = {}
    for name, more in (("without", []), ("with", ["--negative-prompt", "a red circle"])):
        code, _, err = compare(capsys, tmp_path / name, *flags, *more)
        assert code == 0, err
        images[name] = [path.read_bytes() for path in sorted((tmp_path / name).glob("runs/*/images/*.png"))]
    assert len(images["with"]) == len(images["without"]) == 4
    assert images["with"] != images["without"]
    code, _, err = compare(capsys, tmp_path / "with", *flags)
    assert code == 2
    assert 'with another `negative_prompt`: "a red circle" there, null now.' in err


def test_entropies_are_not_held_against_themselves(capsys, tmp_path):
    flags = ["--samplers", "maskgit", "halton", "--metrics", "--seeds", 0, "--grid", 2]
    code, out, err = compare(capsys, tmp_path, *flags)
    assert code == 0, err
    assert "Pearson" not in out
    assert not (tmp_path / "quality_entropy.png").exists()
    assert (tmp_path / "pareto_rows.png").exists()
    assert PIL.Image.open(tmp_path / "samples.jpg").width > 400


def test_rivals_are_chosen_on_one_split_and_measured_on_another(capsys, tmp_path):
    flags = ["--metrics", "composition", "--seeds", 0]
    of_split = {split: ["--prompts", f"demo-{split}", *flags] for split in ("choose", "report")}
    code, out, err = compare(capsys, tmp_path / "choose", *of_split["choose"], "--samplers", "maskgit", "uniform")
    assert code == 0, err
    assert "points above" not in out
    rivals = ["--rivals", tmp_path / "choose" / "results.json"]
    code, out, err = compare(capsys, tmp_path / "report", *of_split["report"], *rivals, "--samplers", "paper")
    assert code == 0, err
    runs = {run["sampler"] for run in json.loads((tmp_path / "report" / "results.json").read_text())["runs"]}
    assert "paper" in runs
    assert runs & {"maskgit", "uniform"}  # those that may be the best at some cost are run too
    for cost in ("states", "NFE", "sequential passes", "s per image"):
        assert f"points above the best greedy rule at equal {cost} |" in out
    assert re.search(r"\| paper, N 2 .* \| [+-]\d+\.\d ± \d+\.\d \((maskgit|uniform)\) \|", out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "must be chosen on other prompts than those of this comparison, got 4 of the same, such as '"),
        ({"weights": "others", "model": "another"}, "must be of the same weights as this comparison, got those of another."),
        ({"prompts": None}, "must have a list of string in its field `prompts`, got null."),
    ],
)
def test_rivals_that_are_none_are_refused_before_any_image_is_made(capsys, tmp_path, compared, changes, message):
    content = json.loads((compared / "results.json").read_text())
    content["settings"] |= changes
    (tmp_path / "rivals.json").write_text(json.dumps(content))
    flags = ["--samplers", "maskgit", "--metrics", "composition", "--rivals", tmp_path / "rivals.json"]
    code, _, err = compare(capsys, tmp_path / "out", *flags)
    assert code == 2
    assert message in err
    assert "rivals.json" in err
    assert not (tmp_path / "out" / "runs").exists()


def test_another_comparison_in_the_same_folder_is_refused(capsys, tmp_path):
    compare(capsys, tmp_path, "--samplers", "maskgit", "--seeds", 0)
    code, _, err = compare(capsys, tmp_path, "--samplers", "maskgit", "--seeds", 0, "--batch-size", 3)
    assert code == 2
    assert "holds a run with another `batch_size`: 16 there, 3 now." in err


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("matplotlib", "Plots need matplotlib: in a clone of this package, pip install -e '.[eval]'."),
        ("scipy", "The checker needs SciPy: in a clone of this package, pip install -e '.[demo]'."),
    ],
)
def test_a_missing_extra_is_found_before_any_image_is_made(capsys, tmp_path, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = compare(capsys, tmp_path / "out", "--samplers", "maskgit")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
