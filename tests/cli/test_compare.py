from __future__ import annotations

import json
import re
import shutil
import sys

import pytest

from diffusers_infogain import cli

ARGUMENTS = ["--num-prompts", "4", "--steps", "2", "--seeds", "0", "1", "--device", "cpu", "--num-candidates", "2", "3"]


def compare(capsys, folder, *arguments) -> tuple[int, str, str]:
    try:
        code = cli.main(["compare", "--output", str(folder), *ARGUMENTS, *map(str, arguments)])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_comparison_writes_figures_table_plots_and_images_and_makes_only_what_is_missing(capsys, tmp_path):
    folder = tmp_path / "out"
    code, out, _ = compare(capsys, folder, "--samplers", "maskgit", "info_gain:gain_reduction=mean")
    assert code == 0
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
    assert (run["model_rows"] - 1) <= 3
    assert len(run["right"]) == len(run["cumulative_entropies"]) == 4
    assert "| 2 | info_gain:gain_reduction=mean, N 3 |" in (folder / "table.md").read_text()
    assert "right (%)" in out
    assert {"pareto_rows.png", "pareto_calls.png", "quality_entropy.png", "winners.png", "entropy_2_steps.png"} <= {
        p.name for p in folder.iterdir()
    }
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
        (["--samplers", "best"], "A sampler must be one of info_gain, lookum,"),
        (["--samplers", "maskgit:token_temperature=-1"], "`token_temperature` must be a number >= 0, got -1."),
        (["--samplers", "maskgit:speed=3"], "got 'speed' in 'maskgit:speed=3'."),
        (["--num-prompts", "0"], "argument --num-prompts: must be an integer >= 1, got 0"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_input_ends_with_one_sentence(capsys, tmp_path, arguments, message):
    code, _, err = compare(capsys, tmp_path, *arguments)
    assert code == 2
    assert re.search(re.escape(message), err.splitlines()[-1])


def test_another_comparison_in_the_same_folder_is_refused(capsys, tmp_path):
    compare(capsys, tmp_path, "--samplers", "maskgit", "--seeds", 0)
    code, _, err = compare(capsys, tmp_path, "--samplers", "maskgit", "--seeds", 0, "--batch-size", 3)
    assert code == 2
    assert "holds a run with another `batch_size`: 16 there, 3 now." in err


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("matplotlib", "Plots need matplotlib: pip install 'diffusers_infogain[eval]'."),
        ("scipy", "The checker needs SciPy: pip install 'diffusers_infogain[demo]'."),
    ],
)
def test_a_missing_extra_is_found_before_any_image_is_made(capsys, tmp_path, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = compare(capsys, tmp_path / "out", "--samplers", "maskgit")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()
