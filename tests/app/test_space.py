"""The folder for a Space runs from these files and the package alone."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from test_command import address_of, start

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"


def test_it_starts_and_answers(tmp_path):
    pytest.importorskip("gradio", reason="the page needs the extra app")
    from gradio_client import Client

    folder = tmp_path / "space"
    shutil.copytree(SPACE, folder)
    shutil.copytree(ROOT / "diffusers_infogain", folder / "diffusers_infogain", ignore=shutil.ignore_patterns("__pycache__"))
    process = start(folder, program=("app.py",), PORT="0", PYTHONPATH="")
    try:
        address = address_of(process).replace("0.0.0.0", "127.0.0.1")
        client = Client(address, verbose=False, download_files=str(tmp_path / "downloads"))
        gallery, line, *_ = client.predict("a red circle", api_name="/generate")
    finally:
        process.kill()
        process.communicate()
    assert Path(gallery[0]["image"]).exists()
    assert "model rows" in line


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["app"]}
    lines = {line for line in (SPACE / "requirements.txt").read_text().splitlines() if line[0] not in "#-"}
    assert {line for line in wanted if not line.startswith("gradio")} == lines


def test_the_front_matter_is_what_spaces_read():
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert (front["sdk"], front["sdk_version"]) == ("gradio", pins["gradio"])
    assert (SPACE / front["app_file"]).exists()
    assert front["license"] == "apache-2.0"
    assert f'requires-python = ">={front["python_version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert len(front["short_description"]) <= 60
    assert re.fullmatch(r"[\w -]+", front["title"])
