"""The error for a missing optional package."""

from __future__ import annotations


def missing(what: str, package: str, extra: str, module: str | None = None) -> ModuleNotFoundError:
    """The error of a feature whose package is part of an optional extra.

    Args:
        what: Subject and verb of the message, such as "Plots need".
        package: The package as users know it.
        extra: The extra in `pyproject.toml` that installs it.
        module: The module that could not be imported, the error's `name`.
    """
    return ModuleNotFoundError(f"{what} {package}: in a clone of this package, pip install -e '.[{extra}]'.", name=module)
