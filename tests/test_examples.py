"""The example scripts run as they stand, at a small size."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.comparison import result
from transformers import PreTrainedTokenizerFast

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler, cli, rules
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.models.llada import BidirectionalLlama

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a script in this process, since every other one imports everything again; what it prints is returned."""

    def in_process(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return in_process


@pytest.mark.slow
def test_demo_training_resumes_and_writes_a_repository(run, tmp_path):
    arguments = ["--output", tmp_path, "--device", "cpu", "--dtype", "float32", "--pool-size", 500, "--report-images", 2]
    run("train_demo_model.py", *arguments, "--vq-steps", 1, "--vq-batch-size", 2, "--steps", 2, "--batch-size", 4)
    assert torch.load(tmp_path / "transformer.pt", weights_only=True)["step"] == 2
    out = run("train_demo_model.py", *arguments, "--vq-steps", 2, "--vq-batch-size", 2, "--steps", 4, "--batch-size", 4)
    assert torch.load(tmp_path / "transformer.pt", weights_only=True)["step"] == 4
    assert "of 2 right" in out
    pipe = InfoGainPipeline.from_pretrained(tmp_path / "model")
    assert pipe("a red circle", num_inference_steps=2, output_type="latent").images.shape == (1, 8, 8)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_text_training_resumes_and_writes_a_loadable_folder(run, tmp_path):
    arguments = ["--output", tmp_path, "--batch-size", 10, "--report-problems", 3]
    run("train_text_model.py", *arguments, "--steps", 2)
    assert torch.load(tmp_path / "text_model.pt", weights_only=True)["step"] == 2
    run("train_text_model.py", *arguments, "--steps", 4)
    assert torch.load(tmp_path / "text_model.pt", weights_only=True)["step"] == 4
    assert json.loads((tmp_path / "model" / "training.json").read_text(encoding="utf-8"))["steps"] == 4
    model = BidirectionalLlama.from_pretrained(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    tokens = tokenizer("M07*12=__________", return_tensors="pt").input_ids
    assert model(tokens).shape == (1, 17, len(tokenizer))
    assert tokenizer.mask_token_id == model.config.mask_token_id


@pytest.mark.slow
def test_caches_are_measured_beside_each_other(run):
    out = run("measure_caches.py", "demo", "--num-captions", 1)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    greedy, lookahead = ["none", "context:0.1", "context:0.25", "ml_cache"], ["none", "context:0.1", "context:0.25"]
    assert [row[1] for row in rows] == [*greedy, *lookahead, *lookahead, *greedy]
    assert all(row[3] == "100.0" for row in rows if row[1] == "none")
    assert "n = 3 images per row" in out


def test_the_pictures_and_the_table_of_the_results_are_made_from_their_figures(run, tmp_path):
    results = EXAMPLES.parent / "docs" / "results"
    for name in ("results.json", "rivals.json"):
        shutil.copy(results / name, tmp_path)
    run("draw_results.py", tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in results.glob("*.png")}
    assert (tmp_path / "demo_table.md").read_bytes() == (results / "demo_table.md").read_bytes()


def test_caches_of_text_models_are_measured(run):
    out = run("measure_text_caches.py", "--num", 2, "--seeds", 1, "--samplers", "confidence")
    assert "| product | 5 | confidence | 10.0 | 100 | 0 | 0 |" in out
    sizes = ["--prompt-length", 8, "--new-tokens", 8, "--block-length", 4, "--hidden-size", 64, "--layers", 1, "--vocab-size", 50]
    out = run("measure_text_caches.py", "--time", "--runs", 1, "--device", "cpu", "--samplers", "confidence", *sizes)
    assert "| confidence | dual, packed |" in out


@pytest.mark.slow
def test_the_pictures_of_the_gallery_are_made_anew(run, tmp_path):
    docs = EXAMPLES.parent / "docs"
    shutil.copytree(docs / "results", tmp_path / "results")
    run("draw_gallery.py", tmp_path, "--num-prompts", 2)
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.suffix in (".png", ".webp")}
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", (docs / "gallery.md").read_text(encoding="utf-8")))
    assert made == shown - {"images/emoji.png"}  # which takes a model of its own


@pytest.mark.slow
@pytest.mark.skipif(
    bool(importlib.util.find_spec("torch_fidelity") and not importlib.util.find_spec("torchvision")),
    reason="torch-fidelity needs torchvision",
)
def test_memory_does_not_grow_with_the_number_of_photographs(run):
    out = run("benchmark_photographs.py", "--counts", 40, 400)
    few, many = (int(text) for text in re.findall(r"reference: (\d+) MiB", out))
    assert many < 1.1 * few


def commands_of(script: str, folder: Path) -> list[list[str]]:
    """What a script calls diffusers-infogain with, run by bash with a stand-in, since arguments are put together there."""
    for name in ("python", "diffusers-infogain"):
        (folder / name).write_text('#!/bin/sh\n[ "$0" = "${0%python}" ] && echo "$@" || true\n')
        (folder / name).chmod(0o755)
    (folder / "out").mkdir()
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / script), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_commands_that_measure_speed_parse(tmp_path):
    commands = commands_of("measure_speed.sh", tmp_path)
    names = re.findall(r"<!-- (?!end )(\w+) -->", (EXAMPLES.parent / "docs" / "speed.md").read_text(encoding="utf-8"))
    assert [path.stem for path in sorted((tmp_path / "out").iterdir())] == sorted(names)
    assert len(commands) == len(names) > 7
    for words in commands:
        args = cli.build_parser().parse_args(words)
        assert args.command == "benchmark"
        assert args.markdown
        for text in args.samplers or ():
            parse_sampler(text, call=("lookahead_batch_size",))


@pytest.mark.parametrize(("script", "least"), [("reproduce_text_results.sh", 25), ("reproduce_results.sh", 25)])
def test_the_commands_that_reproduce_results_parse(tmp_path, script, least):
    samplers = set()
    for words in commands_of(script, tmp_path):
        args = cli.build_parser().parse_args(words)
        for text in getattr(args, "samplers", None) or ():
            InfoGainScheduler(mask_token_id=4, **parse_sampler(text).scheduler)
            samplers.add(text)
    assert len(samplers) > least


def test_the_final_captions_are_used_last_and_to_choose_nothing(tmp_path):
    commands = [words for words in commands_of("reproduce_results.sh", tmp_path) if words[0] == "compare"]
    prompts = [words[words.index("--prompts") + 1] for words in commands]
    assert set(prompts) == {"demo-choose", "demo-report", "demo-final"}
    assert prompts == sorted(prompts, key=["demo-choose", "demo-report", "demo-final"].index)
    for words, split in zip(commands, prompts, strict=True):
        assert ("--rivals" in words) == (split != "demo-choose")
        assert (Path(words[words.index("--output") + 1]).name == "final") == (split == "demo-final")


@pytest.fixture
def choose_settings(monkeypatch):
    spec = importlib.util.spec_from_file_location("choose_settings", EXAMPLES / "choose_settings.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "choose_settings", module)  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_every_greedy_setting_is_chosen_from(choose_settings):
    settings = choose_settings.all_settings()
    assert len(set(settings)) == len(settings) == 4 * (9 * 4 + 2 * 3 + 2 * 2)
    specs = [parse_sampler(name) for name, _ in settings]
    for spec in specs:
        assert not spec.looks_ahead
        InfoGainScheduler(mask_token_id=4, **spec.scheduler)
    greedy = {name for name, sampler in rules.SAMPLERS.items() if not sampler.looks_ahead}
    # Neither those that need frequencies of words, or are others without a bound, nor the published loops of other models alone.
    assert {spec.scheduler["sampler"] for spec in specs} == greedy - {"pc_sampler", "entropy_bound", "ancestral", "titok"}


def test_settings_with_the_smallest_gaps_go_on(choose_settings, monkeypatch, tmp_path):
    """With figures that are known: the accuracy of a setting is fixed, and so is its cost, which is half without guidance."""
    costs = {"a": (2, 9), "b": (4, 9), "c": (6, 2), "d": (8, 9), "e": (18, 1)}
    right = {"a": "1000", "b": "1110", "c": "1100", "d": "1110", "e": "0000"}
    asked = []

    def compare(settings, step, folder):
        asked.append(settings)
        runs = [
            result(name, 64, costs[name][0] * scale / 2, right[name], sequential_passes=costs[name][1], guidance_scale=scale)
            for name, scale in settings
        ]
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"runs": runs}))

    rounds = [choose_settings.Round("r", n, 4, 1, (0,), ("composition",)) for n in (6, 2)]
    monkeypatch.setattr(choose_settings, "NO_GUIDANCE", 1.0)
    monkeypatch.setattr(choose_settings, "all_settings", lambda: [(name, 2.0) for name in costs])
    monkeypatch.setattr(choose_settings, "compare", compare)
    monkeypatch.setattr(choose_settings, "ROUNDS", rounds)
    monkeypatch.setattr(choose_settings, "KNOWN", (("a", 2.0),))
    choose_settings.choose(tmp_path)
    assert asked[0] == [(name, 2.0) for name in costs]
    # None is behind what costs no more; "d" is as good as "b" for more, and of "a" and "e" too few are right.
    assert asked[1] == [("b", 1.0), ("c", 1.0)]
    assert asked[2] == [("b", 1.0), ("c", 1.0), ("b", 2.0), ("c", 2.0), ("d", 2.0), ("a", 2.0)]
    assert asked[3] == [("b", 1.0), ("c", 1.0), ("a", 2.0)]


def test_a_new_rule_decodes(run):
    with mock.patch.dict(rules.RULES), mock.patch.dict(rules.SAMPLERS):
        lines = run("new_rule.py", "--num-texts", 10).splitlines()
    right = {line.split(":")[0]: int(re.search(r"(\d+) of 10 right", line)[1]) for line in lines}
    assert list(right) == ["confidence", "even_first", "info_gain with even_first"]
    assert right["info_gain with even_first"] > right["even_first"]
    assert "even_first" not in rules.RULES
