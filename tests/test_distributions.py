"""The wheel and the sdist, built here and without network: what they hold, and that the wheel works by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path, PurePosixPath

import pytest

import diffusers_infogain

build = pytest.importorskip("hatchling.build", reason="part of the extra 'test'")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_infogain"
VERSION = diffusers_infogain.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        path = folder / build.build_wheel(str(folder))
    assert path.name == f"diffusers_infogain-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    wheel.extractall(folder)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = {PurePosixPath(name) for name in wheel.namelist()}
    metadata = f"diffusers_infogain-{VERSION}.dist-info"
    assert {file.parts[0] for file in files} == {"diffusers_infogain", metadata}
    packaged = {file.relative_to("diffusers_infogain").as_posix() for file in files if file.parts[0] == "diffusers_infogain"}
    source = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert packaged == {name for name in source if "__pycache__" not in name}
    assert {"py.typed", "custom_pipeline.py", "models/imagenet_names.py"} <= packaged
    assert {"demo/model/model_index.json", "demo/model/transformer/diffusion_pytorch_model.safetensors"} <= packaged
    assert {"demo/text_model/model.safetensors", "demo/text_model/tokenizer.json"} <= packaged
    assert {file.suffix for file in map(PurePosixPath, packaged)} <= {".py", ".typed", ".json", ".safetensors", ".md", ".css"}


def test_the_wheel_says_what_it_is(wheel):
    folder = f"diffusers_infogain-{VERSION}.dist-info"
    metadata = BytesParser().parsebytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    assert "diffusers-infogain = diffusers_infogain.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow  # imports everything once more; .ci/run does it
def test_the_bundled_models_run_from_the_wheel(unpacked, tmp_path):
    code = """
import diffusers_infogain
from diffusers_infogain import InfoGainPipeline, load

print(diffusers_infogain.__file__)
print(InfoGainPipeline.from_pretrained("demo")("a red circle", num_inference_steps=2).images[0].size)
print(load("demo-text")(input_ids=[[13] + 16 * [14]], max_new_tokens=0).texts[0][0])
"""
    environment = os.environ | {"PYTHONPATH": str(unpacked), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, encoding="utf-8")
    file, size, text = run.stdout.splitlines()
    assert Path(file).parents[1] == unpacked
    assert (size, text) == ("(64, 64)", "S")


def test_the_sdist_holds_everything_that_builds_and_tests_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        files = {PurePosixPath(name).relative_to(f"diffusers_infogain-{VERSION}").as_posix() for name in archive.getnames()}
    assert {"pyproject.toml", "mkdocs.yml", "constraints.txt", ".ci/run", ".pre-commit-config.yaml"} <= files
    assert {"README.md", "CHANGELOG.md", "docs/results/results.json", "examples/draw_results.py"} <= files
    assert {"tests/conftest.py", "tests/test_distributions.py", "diffusers_infogain/py.typed"} <= files
    assert not {file for file in files if file.startswith((".venv", ".git/", "dist/", "site/", "outputs/", "runs/"))}
