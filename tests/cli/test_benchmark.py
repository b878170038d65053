"""`diffusers-infogain benchmark`."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.commands import run


def benchmark(capsys, *arguments: object) -> str:
    code, out, err = run(capsys, "benchmark", "--device", "cpu", "--runs", 1, *arguments)
    assert code == 0, err
    return out


def test_images_of_the_demo_model(capsys, tmp_path):
    file = tmp_path / "speed.json"
    arguments = ["--samplers", "fast", "maskgit:num_inference_steps=2", "--against", "fast", "--batch-sizes", 2, "--steps", 3]
    out = benchmark(capsys, *arguments, "--json", file)
    lines = out.splitlines()
    assert lines[0] == "demo, 2.5 M parameters."
    assert lines[2].split()[:3] == ["sampler", "batch", "ms"]
    assert lines[2].endswith("time / fast")
    assert lines[4].startswith("fast ")
    assert lines[4].endswith(" 1.00")
    assert lines[5].startswith("maskgit:num_inference_steps=2 ")
    assert "1 run each, in turn: median (lowest to highest)." in lines
    assert any(line.startswith("Measuring adds ") for line in lines)
    record = json.loads(file.read_text())
    fast, maskgit = record["settings"]
    assert record["model"] == "demo"
    assert record["call"]["num_inference_steps"] == 3
    # Two prompts, two steps, each with a negative row, of which the empty canvas has one for both.
    assert maskgit["num_evaluations"] == maskgit["rows"] == [7]
    assert maskgit["num_steps"] == [2]
    assert maskgit["ratios"] == [maskgit["seconds"][0] / fast["seconds"][0]]
    assert record["machine"]["threads"] == torch.get_num_threads()


def test_the_flags_of_generate_name_a_sampler(capsys):
    arguments = ["--random", "maskgit-nano", "--batch-sizes", 1, "--steps", 2]
    out = benchmark(capsys, *arguments, "--preset", "fast", "--num-candidates", 3, "--choice-temperature", 2, 1, "--markdown")
    assert "| fast:num_candidates=3,choice_temperature=2.0:1.0 | 1 | " in out
    out = benchmark(capsys, *arguments, "--samplers", "halton", "info_gain", "--num-candidates", 2, "--guidance-scale", 0)
    assert [line.split()[0] for line in out.splitlines()[4:6]] == ["halton", "info_gain"]
    before = torch.get_num_threads()
    benchmark(capsys, *arguments, "--sampler", "halton", "--threads", 1)
    assert torch.get_num_threads() == before


def test_prompts_are_encoded_and_pixels_decoded_within_the_time_only_if_told(capsys, monkeypatch):
    from diffusers_infogain import InfoGainPipeline

    arguments = ["--sampler", "halton", "--batch-sizes", 1, "--steps", 2, "a red circle"]
    called = []
    monkeypatch.setattr(InfoGainPipeline, "to_pixels", lambda self, tokens: called.append("pixels") or torch.zeros(1, 3, 32, 32))
    benchmark(capsys, *arguments)
    assert not called
    benchmark(capsys, *arguments, "--whole")
    assert called == ["pixels", "pixels"]  # the run before the first counts is one, too


def test_texts(capsys, tmp_path):
    file = tmp_path / "speed.json"
    arguments = ["--samplers", "confidence:cache=none", "confidence:cache=exact", "--batch-sizes", 2, "--max-new-tokens", 6]
    out = benchmark(
        capsys, "--random", "sdar-nano", "--prompt-length", 3, "--size", "num_hidden_layers=1", *arguments, "--json", file
    )
    assert "tokens per s" in out
    assert "The network saw other rows than NFE counts" in out
    none, exact = json.loads(file.read_text())["settings"]
    assert none["rows"] == none["num_evaluations"] == exact["num_evaluations"] == [12]
    out = benchmark(capsys, "--model", "demo-text", "--batch-sizes", 1, "--samplers", "text_fast", "--max-new-tokens", 8)
    assert out.startswith("demo-text, ")


def test_decisions(capsys):
    sizes = ["--length", 8, "--codebook-size", 20, "--num-candidates", 2, "--batch-sizes", 1, 2]
    out = benchmark(capsys, "--decisions", *sizes)
    title = "Decisions on random logits: 8 tokens, 20 codes, 2 candidates, batch 1 and 2."
    assert out.splitlines()[0] == title
    assert out.count("select, kl") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--height", "64", "--model", "demo-text"], "--height does not apply to text."),
        (["--cache", "none"], "--cache does not apply to images."),
        (["--size", "hidden_size=4"], "--size does not apply without --random."),
        (["--sharpness", "2"], "--sharpness does not apply without --random."),
        (["--random", "amused-nano", "--whole"], "--whole does not apply to --random, which has neither text encoder nor image"),
        (["--random", "amused-nano", "a cat"], "Prompts do not apply to --random."),
        (["--samplers", "fast", "--preset", "fast"], "--preset does not apply with --samplers."),
        (["--samplers", "fats"], "A sampler must be one of info_gain,"),
        (["--samplers", "fast:cache=none"], "A sampler's setting must be one of masking_schedule,"),
        (["--decisions", "--samplers", "fast"], "--samplers does not apply with --decisions."),
        (["--decisions", "--gain-reduction", "kl"], "--gain-reduction does not apply with --decisions, which times all of them."),
        (["--decisions", "--preset", "fast"], "--decisions must be used with a sampler that looks ahead, got 'halton' with 8"),
        (
            ["--decisions", "--num-candidates", "1"],
            "--decisions must be used with a sampler that looks ahead, got 'info_gain' with 1",
        ),
        (["--random", "amused-nano", "--size", "layers=2"], "A field of the configuration of amused-nano must be one of"),
        (["--random", "amused-nano", "--size", "layers"], "argument --size: must have the form name=value, got 'layers'"),
        (["--random", "amused"], "argument --random: invalid choice: 'amused'"),
    ],
)
def test_errors(capsys, arguments, sentence):
    code, out, err = run(capsys, "benchmark", "--device", "cpu", *arguments)
    assert code == 2
    assert not out
    assert f"error: {sentence}" in err
    assert len(err.splitlines()) == 1
