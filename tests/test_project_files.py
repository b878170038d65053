"""Files for maintainers and their tools parse, and agree with each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import diffusers_infogain

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
PRE_COMMIT = ROOT / ".pre-commit-config.yaml"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def legs() -> list[str]:
    return re.findall(r"^([a-z]+)\(\) \{$", (ROOT / ".ci" / "run").read_text(), flags=re.M)[1:]  # the first one installs


def test_the_workflow_runs_every_leg_of_the_ci_script():
    (job,) = read(WORKFLOW)["jobs"].values()
    assert job["strategy"]["matrix"]["leg"] == legs()
    assert ".ci/run ${{ matrix.leg }}" in [step.get("run") for step in job["steps"]]
    assert f"set -- {' '.join(legs())}" in (ROOT / ".ci" / "run").read_text()


def test_the_ci_script_names_tests_that_exist():
    paths = re.findall(r"tests/[\w/.]+", (ROOT / ".ci" / "run").read_text())
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_workflow_has_the_lowest_python():
    (job,) = read(WORKFLOW)["jobs"].values()
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert f'requires-python = ">={python}"' in (ROOT / "pyproject.toml").read_text()


def test_pre_commit_has_the_versions_of_the_constraints():
    hooks = [hook for repository in read(PRE_COMMIT)["repos"] for hook in repository["hooks"]]
    assert {"ruff-check", "ruff-format", "mypy"} <= {hook["id"] for hook in hooks}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for hook in hooks:
        assert {"id", "name", "entry", "language"} <= hook.keys()
        for requirement in hook.get("additional_dependencies", []):
            name, version = requirement.split("==")
            assert pins.get(name, version) == version, hook["id"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_what_the_forge_asks_for(form):
    content = read(form)
    assert content["name"]
    assert content["description"]
    assert any(field["type"] != "markdown" for field in content["body"])
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    for field in content["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert "value" in field["attributes"] if field["type"] == "markdown" else "label" in field["attributes"]


def test_the_version_is_the_same_everywhere():
    version = diffusers_infogain.__version__
    assert read(ROOT / "CITATION.cff")["version"] == version
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert next(heading for heading in headings if heading != "Unreleased") == version
    assert "version" not in re.findall(r"^(\w+) = ", (ROOT / "pyproject.toml").read_text(), flags=re.M)


def test_the_layout_names_every_module():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (layout,) = re.findall(r"(?<=^## Layout\n).*?(?=^## )", page, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", layout))
    package = ROOT / "diffusers_infogain"
    files = {path.name for path in package.glob("*.py") if not path.name.startswith(("__", "pipeline_infogain"))}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert files | folders <= named
    gone = {name for name in named if not ((package / name).exists() or (package / "cli" / name).exists())}
    assert gone == {"tests/test_imports.py"}
