from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers import DiffusionPipeline
from helpers.commands import run
from PIL import Image, ImageChops

import diffusers_infogain
from diffusers_infogain import cli
from diffusers_infogain.cli import common
from diffusers_infogain.settings import SETTINGS


def generate(capsys, repository, folder, *arguments):
    return run(
        capsys,
        "generate",
        "--model",
        repository,
        "--output",
        folder,
        "--steps",
        3,
        "--guidance-scale",
        2,
        "--device",
        "cpu",
        *arguments,
    )


def test_generate_writes_one_png_per_prompt_and_seed_with_its_settings(capsys, stock_repository, tmp_path):
    code, out, err = generate(
        capsys, stock_repository, tmp_path, "a fox", "b", "--num-images", 2, "--seed", 5, "--num-candidates", 3, "--grid"
    )
    assert code == 0
    assert "4 images in" in out
    assert "NFE" in out
    assert "cumulative entropy" in out
    assert "%|" not in err, "no bar in a log"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "00000-a-fox-seed5.png",
        "00001-a-fox-seed6.png",
        "00002-b-seed5.png",
        "00003-b-seed6.png",
        "grid.png",
    ]
    metadata = json.loads(Image.open(tmp_path / names[1]).text["infogain"])
    assert metadata["prompt"] == "a fox"
    assert metadata["seed"] == 6
    assert metadata["num_inference_steps"] == 3
    assert metadata["scheduler"]["num_candidates"] == 3
    assert metadata["model"] == stock_repository


def test_an_image_does_not_depend_on_the_others_of_its_run(capsys, stock_repository, tmp_path):
    generate(capsys, stock_repository, tmp_path / "alone", "b", "--seed", 6)
    generate(capsys, stock_repository, tmp_path / "many", "a", "b", "--seed", 5, "--num-images", 2, "--batch-size", 3)
    alone, many = Image.open(tmp_path / "alone/00000-b-seed6.png"), Image.open(tmp_path / "many/00003-b-seed6.png")
    # In a batch sums round differently, and a channel may fall on the other side of one level; other tokens change many by more.
    assert max(high for _, high in ImageChops.difference(alone, many).getextrema()) <= 1


def test_prompts_come_from_a_file(capsys, stock_repository, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first\n\n second \n")
    code, _, _ = generate(capsys, stock_repository, tmp_path / "out", "--prompts-file", prompts)
    assert code == 0
    assert sorted(path.name[6:] for path in (tmp_path / "out").iterdir()) == ["first-seed0.png", "second-seed0.png"]


def test_every_sampler_setting_reaches_the_scheduler(capsys, stock_repository, tmp_path):
    settings = {
        "sampler": "lookum",
        "certainty": "margin",
        "num_candidates": 2,
        "token_temperature": 0.5,
        "top_k": 9,
        "top_p": 0.9,
        "confidence_threshold": 0.7,
        "gain_weight": 0.3,
        "gain_reduction": "mean",
        "masking_schedule": "linear",
        "tokens_per_step": 8,
        "entropy_bound": 0.2,
        "klass_threshold": 0.01,
        "klass_history": 3,
        "pc_frequencies": "frequencies.safetensors",
        "pc_decay": 0.1,
        "pc_clip": 5.0,
        "parallel_threshold": 0.8,
    }
    others = ["--halton-randomize", "--position-temperature", 1.5, 0, "--choice-temperature", 3, "--pivot-temperature", 2]
    flags = [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), value)]
    code, _, _ = generate(
        capsys,
        stock_repository,
        tmp_path,
        "a",
        *flags,
        *others,
    )
    assert code == 0
    (path,) = tmp_path.iterdir()
    config = json.loads(Image.open(path).text["infogain"])["scheduler"]
    assert {name: config[name] for name in settings} == settings
    assert config["position_temperature"] == [1.5, 0]
    assert (config["choice_temperature"], config["pivot_temperature"]) == (3, 2)
    assert config["halton_randomize"] is True
    assert {*settings, *SETTINGS, "mask_token_id"} == set(config)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "No prompts: give them as arguments, or a file with one per line by --prompts-file."),
        (("a", "--sampler", "best"), "`sampler` must be one of info_gain, lookum, confidence"),
        (("a", "--num-candidates", "0"), "argument --num-candidates: must be an integer >= 1, got 0"),
        (("a", "--token-temperature", "-1"), "argument --token-temperature: must be a number >= 0, got -1.0"),
        (("a", "--steps", "0"), "argument --steps: must be an integer >= 1, got 0"),
        (("a", "--num-images", "0"), "argument --num-images: must be an integer >= 1, got 0"),
        (("a", "--height", "9"), "`height` and `width` must be positive multiples of 2, got 9 and 8."),
        (
            ("a", "--guidance-interval", 0.5, 0.25),
            "`guidance_interval` must be a pair (start, stop) with 0 <= start < stop",
        ),
        (("a", "--approximate-cache", "kv"), "`approximate_cache` must be None, 'context:TOLERANCE' with a share from 0 to 1"),
        (
            ("a", "--guidance-schedule", "up"),
            "maskgen_linear, maskgen_cosine, got 'up'.",
        ),
        (("a", "--prompts-file", "missing.txt"), "missing.txt is missing."),
        (("a", "--position-temperature", "1", "2", "3"), "`position_temperature` must be one number or two"),
        (("a", "--num-beams", "2", "--retry-below-nats", "-7"), "`num_beams` must be 1 with a scheduler that begins unlikely"),
    ],
)
def test_wrong_input_gives_one_sentence_and_exit_code_2(capsys, stock_repository, tmp_path, arguments, sentence):
    code, _, err = generate(capsys, stock_repository, tmp_path, *arguments)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_unknown_flags_give_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "a", "--stepz", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("diffusers-infogain: error: unrecognized arguments: --stepz 3")


def test_a_missing_model_or_file_is_named(capsys, stock_repository, tmp_path):
    code, _, err = generate(capsys, tmp_path / "nowhere", tmp_path / "out", "a")
    assert code == 2
    assert "nowhere" in err
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", stock_repository, broken], check=True)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    code, _, err = generate(capsys, broken, tmp_path / "out", "a")
    assert code == 2
    assert "diffusion_pytorch_model.safetensors" in err


def test_an_unwritable_folder_is_refused_before_any_work(capsys, stock_repository, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = generate(capsys, stock_repository, tmp_path / "file", "a")
    assert code == 2
    assert "Cannot write to the output folder" in err
    assert "images in" not in out


def test_another_text_encoder_is_for_the_families_that_take_one(capsys, stock_repository, tmp_path):
    code, _, err = generate(capsys, stock_repository, tmp_path, "a", "--text-encoder", "laion/other")
    assert code == 2
    assert "--text-encoder does not apply to InfoGainPipeline, which this checkpoint is for." in err


def test_offloading_takes_a_gpu(capsys, stock_repository, tmp_path, monkeypatch):
    code, _, err = generate(capsys, stock_repository, tmp_path, "a", "--offload")
    assert code == 2
    assert err.splitlines()[-1] == "diffusers-infogain: error: --offload must be used with a GPU, got --device cpu."
    asked = []
    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", lambda self, device: asked.append(device))
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, device: pytest.fail("the whole model is on the GPU"))
    flags = {"dtype": "float32", "device": "cuda:1", "compile": False, "quantize": None, "device_map": None}
    common.load_pipeline(SimpleNamespace(model=stock_repository, offload=True, **flags))
    assert asked == ["cuda:1"]
    code, _, err = generate(capsys, stock_repository, tmp_path, "a", "--device-map", "auto")
    assert code == 0, err


def test_quantized_models_generate_and_are_recorded(capsys, stock_repository, tmp_path):
    if importlib.util.find_spec("torchao") is None:
        code, _, err = generate(capsys, stock_repository, tmp_path, "a", "--quantize", "int8")
        assert code == 2
        assert "The quantization int8 needs torchao: in a clone of this package, pip install -e '.[quantization]'." in err
        return
    args = SimpleNamespace(model=stock_repository, dtype="bfloat16", device="cpu", offload=False, compile=False, device_map=None)
    plain, quantized = (common.load_pipeline(SimpleNamespace(**vars(args), quantize=name)) for name in (None, "int8"))
    assert type(quantized.transformer.encoder_proj.weight).__name__ == "Int8Tensor"
    records = [
        common.identity(SimpleNamespace(**vars(args), quantize=name), pipe) for name, pipe in ((None, plain), ("int8", quantized))
    ]
    assert "quantize" not in records[0]
    assert records[1]["quantize"] == "int8"
    assert records[0]["weights"] != records[1]["weights"]


def test_demo_draws_the_grid(capsys, tmp_path):
    code, out, _ = run(capsys, "demo", "--num-prompts", 4, "--steps", 2, "--output", tmp_path, "--device", "cpu")
    assert code == 0
    for name in ("confidence", "MaskGIT"):
        assert f"{name}: 2 steps: 2 states, 3 NFE in 2 sequential passes" in out  # all prompts share a negative row
    for name in ("fast (greedy)", "lookahead (default), lazy threshold 3"):
        assert f"{name}: at most 8 steps: " in out
    assert "of 4 held-out prompts right" in out
    picture = Image.open(tmp_path / "demo.png")
    assert min(picture.size) > 500


@pytest.mark.parametrize(("command", "setting"), [("exact", "guidance_scale"), ("compare-text", "guidance_schedule")])
def test_what_is_not_guided_has_no_settings_of_guidance(capsys, command, setting):
    code, _, err = run(capsys, command, "--samplers", f"maskgit:{setting}=2")
    assert code == 2
    assert "A sampler's setting must be one of" in err
    assert f"got '{setting}' in 'maskgit:{setting}=2'." in err


def test_exact_prints_tables(capsys):
    code, out, _ = run(capsys, "exact", "--num-samples", 3)
    assert code == 0
    assert out.count("| info_gain sum |") == 4


def test_exact_compares_the_samplers_that_are_given_on_a_split(capsys):
    flags = ["exact", "--num-samples", 4, "--samplers", "left:entropy_bound=8", "maskgit:tokens_per_step=32,num_runs=2"]
    code, out, _ = run(capsys, *flags)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("**")] == [
        "**4x4 Sudoku",
        "**8x8 digits",
        "**8x8 digits, grey levels written by 1, 6, 6, 6 codes",
    ]
    assert out.count("| left:entropy_bound=8 |") == 3
    rows = [line.split(" | ")[4] for line in out.splitlines() if line.startswith("| maskgit")]
    assert rows == ["2.0", "4.0", "4.0"]
    assert run(capsys, *flags, "--seeds", 1002)[1] == run(capsys, *flags, "--split", "choose", "--seeds", 2)[1] != out
    code, _, err = run(capsys, "exact", "--samplers", "margin:num_beams=2")
    assert code == 2
    assert "`samplers` must not search with beams on exact models, got 'margin:num_beams=2'." in err


def test_the_console_script_is_installed():
    script = Path(sys.executable).parent / "diffusers-infogain"
    if not script.exists():
        pytest.skip("the package is not installed")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0
    assert "generate" in done.stdout
    assert diffusers_infogain.__version__
