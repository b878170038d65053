"""What pyproject.toml declares is what the constraints files pin, and so what CI runs."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS = {"build", "mypy", "pre-commit", "ruff", "twine"}
"""Of the extra `dev` alone: their newest versions are pinned, no lowest ones are tested."""


def declared() -> dict[str, str]:
    """Lower bounds by name, of the package, its extras and its tests."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    bounds = {}
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == ">=", f"{requirement} has no lower bound alone"
        assert bounds.setdefault(normal(requirement.name), specifier.version) == specifier.version
    return {name: version for name, version in bounds.items() if name not in TOOLS}


def pinned(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(pins), lines
    assert len({normal(pin[1]) for pin in pins}) == len(pins)
    return {normal(pin[1]): pin[2] for pin in pins}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lowest_versions_are_those_declared():
    assert pinned("constraints-lowest.txt") == declared()


def test_the_newest_versions_tested_are_admitted():
    newest = pinned("constraints.txt")
    assert not declared().keys() - newest.keys()
    for name, bound in declared().items():
        assert Version(newest[name]) >= Version(bound), name


def test_python_is_the_same_everywhere():
    major, minor = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["project"]["requires-python"]).groups()
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{major}{minor}"
    assert PROJECT["tool"]["mypy"]["python_version"] == f"{major}.{minor}"
    assert f"Python {major}.{minor} or newer" in (ROOT / "README.md").read_text()
    assert sys.version_info >= (int(major), int(minor))


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_ci_installs_every_constraints_file(file):
    assert f"-c {file}" in (ROOT / ".ci" / "run").read_text()
