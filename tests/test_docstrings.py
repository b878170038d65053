"""Docstrings describe the parameters that exist, by reading the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffusers_infogain"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def described(docstring: str) -> list[str]:
    """The names under "Args:", of which several may share a line."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, flags=re.DOTALL | re.MULTILINE)
    names = re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", section[1], flags=re.MULTILINE) if section else []
    return [name.strip("* ") for line in names for name in line.split(",")]


def parameters(node: ast.FunctionDef | ast.ClassDef) -> list[str] | None:
    """Of a function, or of a class: its constructor's, else a dataclass's fields; None if another class defines them."""
    if isinstance(node, ast.ClassDef):
        constructors = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
        if not constructors:
            return [child.target.id for child in node.body if isinstance(child, ast.AnnAssign)] or None
        (node,) = constructors
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in (*named, arguments.vararg, arguments.kwarg) if argument]


@pytest.mark.parametrize("module", MODULES)
def test_arguments_described_exist(module):
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known = parameters(node)
            for name in described(ast.get_docstring(node) or ""):
                assert known is None or name in known, f"{node.name} has no parameter {name}"


def test_several_names_on_a_line_are_read():
    assert described("One line.\n\nArgs:\n    a, b: Two.\n        more: of it.\n    **c: Rest.\n\nRaises:\n    d: No.") == [
        "a",
        "b",
        "c",
    ]
