"""What to say where an optional package is missing."""

from __future__ import annotations


def missing(what: str, package: str, extra: str, module: str | None = None) -> ModuleNotFoundError:
    """The error for something that needs a package of an extra of `pyproject.toml`.

    Args:
        what: The subject of the sentence, with its verb: "Plots need".
        module: The module that could not be imported.
    """
    return ModuleNotFoundError(f"{what} {package}: in a clone of this package, pip install -e '.[{extra}]'.", name=module)
