"""Exported repositories run where this package cannot be imported, and give the package's own output, bit for bit."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import AmusedPipeline, DiffusionPipeline
from helpers.amused import make_components
from helpers.checkpoints import make_lumina_pipeline, make_mmada_pipeline, make_showo_pipeline
from helpers.checkpoints_maskgit import write_maskgit_checkpoint
from helpers.checkpoints_meissonic import write_meissonic_repository
from helpers.checkpoints_text import write_bert, write_llada
from helpers.checkpoints_titok import make_maskgen_pipeline, make_titok_pipeline
from huggingface_hub import ModelCard

import diffusers_infogain
from diffusers_infogain import InfoGainPipeline, InfoGainScheduler, cli, export_pipeline, load, rules
from diffusers_infogain.token_frequencies import save_token_frequencies

# What the scheduler of each family is set to, other than the defaults, and the call.
SAMPLERS: dict[str, dict[str, Any]] = {
    "demo": {"num_candidates": 3, "sampler": "info_gain", "certainty": "margin"},
    "amused": {"sampler": "maskgit", "token_temperature": (1.0, 0.5)},
    "maskgit": {"sampler": "halton", "halton_randomize": True, "masking_schedule": "arccos"},
    "maskgen": {"sampler": "titok", "randomize_temperature": (2.0, 0.0)},
    "titok": {"sampler": "titok", "softmax_temperature": (1.3, 0.5)},
    "meissonic": {"sampler": "lookum", "num_candidates": 4},
    "mmada": {"corrector": "remdm_conf", "sampler": "confidence"},
    "showo": {"sampler": "maskgit", "annealing": "product"},
    "lumina": {"sampler": "klass", "entropy_bound": 0.5},
    "demo-text": {"retry_below_sigmas": None},
    "llada": {"sampler": "left", "tokens_per_step": 2},
    "bert": {"sampler": "uniform"},
}
CALLS: dict[str, dict[str, Any]] = {
    "demo": {"prompt": ["a red circle", "two blue squares"], "guidance_scale": 1.2},
    "amused": {"prompt": "a", "num_inference_steps": 3},
    "maskgit": {"class_labels": ["golden retriever", 3], "num_inference_steps": 4},
    "maskgen": {"prompt": "a cat", "num_inference_steps": 4},
    "titok": {"class_labels": ["golden retriever", 3], "num_inference_steps": 4},
    "meissonic": {"prompt": "a", "num_inference_steps": 3, "height": 64, "width": 64},
    "mmada": {"prompt": "a red cat", "num_inference_steps": 4},
    "showo": {"prompt": "a red cat", "num_inference_steps": 4},
    "lumina": {"prompt": "a red cat", "num_inference_steps": 4},
    "demo-text": {"input_ids": [[13] + 16 * [14]], "max_new_tokens": 0},
    "llada": {"prompt": "a red cat", "max_new_tokens": 8},
    "bert": {"prompt": "a red cat", "max_new_tokens": 4},
}
IMAGES = tuple(family for family in SAMPLERS if family not in ("demo-text", "llada", "bert"))

PROGRAM = """
import importlib.abc, json, sys
from pathlib import Path

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_infogain":
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Blocked())
import numpy, torch
from diffusers import DiffusionPipeline

def output(pipe, call):
    generator = torch.Generator().manual_seed(7)
    if hasattr(pipe, "model"):
        found = pipe(**call, generator=generator)
        return found.sequences.numpy(), numpy.array(found.texts)
    tokens = pipe(**call, generator=generator, output_type="latent").images
    pixels = pipe(**call, generator=torch.Generator().manual_seed(7), output_type="np").images
    edited = pipe(**call, image=pixels[0], strength=0.5, generator=torch.Generator().manual_seed(8), output_type="np").images
    return tokens.numpy(), numpy.concatenate([pixels, edited])

folder, calls = Path(sys.argv[1]), json.loads(sys.argv[2])
for family, call in calls.items():
    for name in (family, f"{family} again"):
        place = str(folder / name)
        pipe = DiffusionPipeline.from_pretrained(place, custom_pipeline=place, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        tokens, pixels = output(pipe, call)
        numpy.savez(f"{place}.npz", tokens=tokens, pixels=pixels)
        assert type(pipe).__module__.startswith("diffusers_modules.local."), type(pipe)
        settings = {name: value for name, value in pipe.scheduler.config.items() if name[0] != "_"}
        Path(f"{place}.json").write_text(json.dumps(settings))
        if name == family:
            pipe.save_pretrained(f"{place} again")
assert "diffusers_infogain" not in sys.modules
"""


def make_pipes(folder: Path) -> dict[str, Any]:
    pipes = {
        "demo": load("demo"),
        "amused": InfoGainPipeline(**make_components()),
        "maskgit": load(write_maskgit_checkpoint(folder / "maskgit")),
        "maskgen": make_maskgen_pipeline(),
        "titok": make_titok_pipeline(),
        "meissonic": load(write_meissonic_repository(folder / "meissonic", True)),
        "mmada": make_mmada_pipeline(),
        "showo": make_showo_pipeline(),
        "lumina": make_lumina_pipeline(),
        "demo-text": load("demo-text"),
        "llada": load(write_llada(folder / "llada")),
        "bert": load(write_bert(folder / "bert")),
    }
    for family, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **SAMPLERS[family])
    return pipes


@pytest.fixture(scope="module")
def pipes(tmp_path_factory) -> dict[str, Any]:
    return make_pipes(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def exported(pipes, tmp_path_factory) -> Path:
    """A folder, with spaces in its name, of exports by family, and what they gave in another process."""
    folder = tmp_path_factory.mktemp("exports") / "two words"
    for family, pipe in pipes.items():
        export_pipeline(pipe, folder / family)
    run_elsewhere(PROGRAM, folder, str(folder), json.dumps(CALLS))
    return folder


def run_elsewhere(program: str, folder: Path, *arguments: str) -> str:
    """Runs a program in a new process without this package, and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder.parent / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", program, *arguments]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=folder, env=environment)
    assert run.returncode == 0, run.stderr
    assert "not found in your environment" not in run.stderr
    return run.stdout


def output(pipe: Any, call: dict[str, Any]) -> tuple[np.ndarray, Any]:
    generator = torch.Generator().manual_seed(7)
    if hasattr(pipe, "model"):
        found = pipe(**call, generator=generator)
        return found.sequences.numpy(), np.array(found.texts)
    tokens = pipe(**call, generator=generator, output_type="latent").images
    pixels = pipe(**call, generator=torch.Generator().manual_seed(7), output_type="np").images
    edited = pipe(**call, image=pixels[0], strength=0.5, generator=torch.Generator().manual_seed(8), output_type="np").images
    return tokens.numpy(), np.concatenate([pixels, edited])


@pytest.mark.parametrize("family", SAMPLERS)
def test_an_export_gives_the_same_tokens_images_and_edits_without_the_package_also_saved_again(exported, pipes, family):
    tokens, pixels = output(pipes[family], CALLS[family])
    for name in (family, f"{family} again"):
        found = np.load(exported / f"{name}.npz")
        assert np.array_equal(found["tokens"], tokens)
        assert np.array_equal(found["pixels"], pixels)


@pytest.mark.parametrize("family", SAMPLERS)
def test_an_export_keeps_the_settings_of_the_scheduler(exported, family):
    for name in (family, f"{family} again"):
        settings = json.loads((exported / f"{name}.json").read_text())
        for setting, value in SAMPLERS[family].items():
            assert settings[setting] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("family", SAMPLERS)
def test_the_package_loads_an_export_without_its_code(exported, pipes, family):
    for name in (family, f"{family} again"):
        pipe = load(exported / name)
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe) is type(pipes[family])
        assert type(pipe.scheduler) is InfoGainScheduler
        assert np.array_equal(output(pipe, CALLS[family])[0], output(pipes[family], CALLS[family])[0])


@pytest.mark.parametrize("family", SAMPLERS)
def test_an_export_saved_again_has_the_same_code(exported, family):
    code = {path.name: path.read_text() for path in (exported / family).glob("*.py")}
    assert {path.name: path.read_text() for path in (exported / f"{family} again").glob("*.py")} == code
    assert len(code) > 30


def test_modules_that_several_exports_have_are_the_same_in_all(exported):
    found: dict[str, set[str]] = {}
    for family in SAMPLERS:
        for path in (exported / family).glob("infogain_*.py"):
            found.setdefault(path.name, set()).add(path.read_text())
    assert len(found) > 40
    assert {name for name, texts in found.items() if len(texts) > 1} == set()


def test_exported_code_needs_neither_the_package_nor_what_only_loads_published_formats(exported):
    for path in exported.glob("*/*.py"):
        text = path.read_text()
        compile(text, path, "exec")
        assert text.startswith(f"# Part of diffusers_infogain {diffusers_infogain.__version__}")
        assert "SPDX-License-Identifier: Apache-2.0" in text
        assert not re.search(r"^\s*(from|import)\s+diffusers_infogain", text, flags=re.M), path
        assert not re.search(r"open_published|is_published|Repository\b|ModelSource", text), path
        assert max(len(re.sub(r"  # (type: ignore|noqa).*", "", line)) for line in text.splitlines()) <= 130, path
        siblings = {other.stem for other in path.parent.glob("*.py")}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert {node.module} <= siblings if node.module else {alias.name for alias in node.names} <= siblings
    assert not list(exported.glob("*/infogain_checkpoints_published.py"))


def test_no_error_of_exported_code_names_commands_of_the_package(exported):
    for path in exported.glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                assert "diffusers-infogain" not in ast.unparse(node), path
                # Files of token frequencies are made by the package; no export brings one.
                assert "diffusers_infogain" not in ast.unparse(node).replace("diffusers_infogain.token_frequencies", ""), path


@pytest.mark.slow
def test_two_exports_load_in_one_process_in_any_order(exported):
    program = """
import sys
from diffusers import DiffusionPipeline
for name in ("demo", "maskgit", "demo", "bert"):
    place = f"{sys.argv[1]}/{name}"
    pipe = DiffusionPipeline.from_pretrained(place, custom_pipeline=place, trust_remote_code=True)
    print(type(pipe).__name__)
"""
    lines = run_elsewhere(program, exported, str(exported)).split()
    assert lines == ["InfoGainPipeline", "InfoGainMaskGITPipeline", "InfoGainPipeline", "InfoGainTextPipeline"]


def test_code_is_not_run_without_consent(exported):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(exported / "demo", custom_pipeline=str(exported / "demo"))


def test_paths_of_the_machine_stay_on_it(exported):
    for name in ("demo", "maskgit", "meissonic", "llada"):
        paths = sorted((exported / name).rglob("*.json"))
        assert len(paths) > 3
        for path in paths:
            assert "_name_or_path" not in path.read_text(), path
        assert "_name_or_path" not in (exported / f"{name} again" / "model_index.json").read_text()
        assert str(exported) not in (exported / name / "README.md").read_text()


def test_what_an_export_holds(pipes, tmp_path):
    written = export_pipeline(pipes["demo"], tmp_path / "demo", license="mit", base_model="me/model", max_shard_size="1MB")
    assert written.modules[0] == "pipeline.py"
    assert {path.name for path in (tmp_path / "demo").glob("*.py")} == set(written.modules)
    assert written.code_bytes == sum(path.stat().st_size for path in (tmp_path / "demo").glob("*.py"))
    assert written.num_bytes == sum(path.stat().st_size for path in (tmp_path / "demo").rglob("*") if path.is_file())
    assert (tmp_path / "demo" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    data = ModelCard.load(tmp_path / "demo" / "README.md").data
    assert (data.license, data.base_model, data.library_name) == ("mit", "me/model", "diffusers")


class Other(torch.nn.Module):
    pass


def test_what_cannot_be_exported_gets_one_sentence(pipes, tmp_path):
    def exporting(text: str, pipe: Any, folder: Any = tmp_path / "new") -> None:
        with pytest.raises(ValueError, match=text) as error:
            export_pipeline(pipe, folder)
        assert len(str(error.value)) < 500
        assert list(tmp_path.iterdir()) == [tmp_path / "there"]

    (tmp_path / "there").mkdir()
    demo = pipes["demo"]
    exporting(r"The folder '.*there' must not exist yet", demo, tmp_path / "there")
    exporting("`folder` must be a path, got 3", demo, 3)
    exporting(
        "`pipe` must be one of InfoGainMaskGITPipeline, .* to be exported, got AmusedPipeline",
        AmusedPipeline(**make_components()),
    )
    components = demo.components
    exporting("`vqvae` must not be None", InfoGainPipeline(**{**components, "vqvae": None}))
    exporting(
        "`transformer` must be of a class of diffusers, transformers, .* got Other",
        InfoGainPipeline(**{**components, "transformer": Other()}),
    )

    def with_scheduler(**settings: Any) -> InfoGainPipeline:
        scheduler = InfoGainScheduler.from_config(demo.scheduler.config, **settings)
        return InfoGainPipeline(**{**components, "scheduler": scheduler})

    save_token_frequencies(torch.full((194,), 0.5), tmp_path / "there" / "frequencies")
    file = str(tmp_path / "there" / "frequencies")
    exporting("`pc_frequencies` must be None to export a pipeline, got the file", with_scheduler(pc_frequencies=file))
    with mock.patch.dict(rules.RULES), mock.patch.dict(rules.SAMPLERS):
        rules.rule("of_mine")(lambda step: -step.entropies)
        exporting(
            "`sampler` must be one of this package's to export a pipeline, got 'of_mine'", with_scheduler(sampler="of_mine")
        )
        exporting("`certainty` must be one of this package's", with_scheduler(sampler="info_gain", certainty="of_mine"))


def test_an_interrupted_export_leaves_nothing(pipes, tmp_path, monkeypatch):
    monkeypatch.setattr(type(pipes["amused"].transformer), "save_pretrained", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_pipeline(pipes["amused"], tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_with_its_sampler(tmp_path, capsys):
    folder = tmp_path / "my demo"
    arguments = ["export", "demo", str(folder), "--preset", "paper", "--num-candidates", "2", "--guidance-scale", "1.5"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"demo as InfoGainPipeline, written to {folder} in " in printed
    assert f"folder = {str(folder)!r}" in printed
    pipe = load(folder)
    assert pipe.scheduler.config.num_candidates == 2
    assert pipe.scheduler.config.certainty == "confidence"
    assert pipe.default_guidance_scale == 1.5
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert cli.main(arguments) == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert cli.main(["export", "demo-text", str(tmp_path / "text"), "--guidance-scale", "2"]) == 2
    assert "--guidance-scale does not apply to InfoGainTextPipeline" in capsys.readouterr().err
