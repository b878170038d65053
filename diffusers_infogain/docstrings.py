"""Docstrings of methods that complete each other."""

from __future__ import annotations

import inspect
import re
from typing import Any


def _argument_entries(docstring: str) -> dict[str, str]:
    """The entries under "Args:" in a docstring, by the names that they begin with."""
    section = inspect.cleandoc(docstring).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (?=\w)", section, flags=re.MULTILINE)[1:]
    return {entry.partition(":")[0]: entry.rstrip() for entry in entries}


def with_arguments_of(call: Any, parent: Any) -> str:
    """The docstring of `call`, with the entries of its parent's for those of its arguments that it does not describe."""
    own, inherited = _argument_entries(call.__doc__), _argument_entries(parent.__doc__ or "")
    described = {name for names in own for name in names.split(", ")}
    missing = set(inspect.signature(call).parameters) - described
    entries = [*own.values(), *(entry for names, entry in inherited.items() if missing & set(names.split(", ")))]
    head, _, rest = inspect.cleandoc(call.__doc__).partition("Args:\n")
    tail = rest.partition("\n\n")[2]
    return f"{head}Args:\n" + "\n".join(f"    {entry}" for entry in entries) + (f"\n\n{tail}" if tail else "")
