"""Fields of configuration files, checked before a class sees them."""

from __future__ import annotations

import collections.abc
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from ..checks import shown
from ..files import read_json
from .errors import one_sentence
from .weights import Checkpoint

_UNHEEDED = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
_REPEATED = re.compile(r"layer|block|label|depth|expert")
_SIZED = re.compile(r"size|dim|length|channels|vocab|token")
_LARGEST_COUNT = 4096
_LARGEST_TABLE = 2**24


def own_fields(kind: type, file: Path) -> dict[str, Any]:
    """Those fields of a config.json that are arguments of the class.

    Raises:
        ValueError: If one is of another type.
    """
    config = read_json(file)
    check_fields(kind, config, file)
    names = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    return {name: value for name, value in config.items() if name in names}


def require_fields(config: Mapping[str, Any], expected: Mapping[str, Any], file: Path | str) -> None:
    """Raises a ValueError for the first field of a configuration that says what no model here can do.

    Args:
        expected: Field and the one value that is supported; a missing field counts as that value.
    """
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: `{name}` must be {value!r}, got {shown(config[name])}.")


def check_fields(kind: type, settings: Mapping[str, Any], file: Path | str) -> None:
    """Refuses fields of a configuration whose type is not that of the class's argument.

    Raises:
        ValueError: For the first such field.
    """
    for name, hint in typing.get_type_hints(kind.__init__).items():  # type: ignore[misc]
        if name in settings and not _fits(settings[name], hint):
            shown_hint = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{file}: `{name}` must be of the type {shown_hint}, got {shown(settings[name])}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if origin in (tuple, list, collections.abc.Sequence) or hint in (tuple, list):
        return isinstance(value, (list, tuple)) and all(_fits(one, arguments[0]) for one in value if arguments)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    return True


def check_sizes(settings: Mapping[str, Any], checkpoint: Checkpoint, file: Path) -> None:
    """Refuses numbers of a config.json that no model of these weights has, before anything is made of them.

    Classes of transformers make lists and tables of so many entries when they read a configuration.

    Raises:
        ValueError: For the first such number.
    """
    count, elements = len(checkpoint.shapes), checkpoint.num_elements
    largest = max(_LARGEST_COUNT, count)
    for name, value in _numbers(settings):
        if abs(value) >= 2**63:
            raise ValueError(f"{file}: `{name}` must be an integer of 64 bits, got {shown(value)}.")
        if not 0 <= value <= largest and _REPEATED.search(name) and not _SIZED.search(name):
            raise ValueError(
                f"{file}: `{name}` must be from 0 to {largest} for the {count} tensors of {checkpoint.described}, got {value}."
            )
        if value > max(_LARGEST_TABLE, elements) and "theta" not in name:
            raise ValueError(
                f"{file}: `{name}` must be at most {max(_LARGEST_TABLE, elements)} for the {elements} numbers of "
                f"{checkpoint.described}, got {value}."
            )
    positions, width = settings.get("max_position_embeddings"), settings.get("hidden_size")
    if isinstance(positions, int) and isinstance(width, int) and positions * width > max(_LARGEST_TABLE, 64 * elements):
        raise ValueError(
            f"{file}: `max_position_embeddings` {positions} is too large for the {elements} numbers of {checkpoint.described}."
        )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All integers in a JSON value, with the name of the field that they stand in."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def stock_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the fields that would have transformers look for code: kernels for attention, classes of its own."""
    return {
        name: stock_settings(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _UNHEEDED
    }


def stock_config(kind: Any, settings: Mapping[str, Any], file: Path) -> Any:
    """A configuration of transformers' from a config.json that `stock_settings` went over.

    Raises:
        ValueError: If the class refuses it, naming the file.
    """
    inner = settings.get(kind.base_config_key) if settings.get("model_type") != kind.model_type else None
    with one_sentence(f"{file} makes no {kind.__name__}"):
        return kind.from_dict(dict(inner if isinstance(inner, dict) else settings))
