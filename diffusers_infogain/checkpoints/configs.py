"""Checks of configuration files, before a model class reads them."""

from __future__ import annotations

import collections.abc
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

_IGNORED = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
# Fields that count layers or the like, unless their name says that they are a size.
_COUNTS = re.compile(r"layer|block|label|depth|expert")
_SIZES = re.compile(r"size|dim|length|channels|vocab|token")
_LARGEST_COUNT = 4096
_LARGEST_TABLE = 2**24


def own_fields(model_class: type, file: Path) -> dict[str, Any]:
    """The fields of a config.json that are arguments of a model class.

    Raises:
        ValueError: If one has the wrong type.
    """
    config = read_json(file)
    check_fields(model_class, config, file)
    arguments = typing.get_type_hints(model_class.__init__)  # type: ignore[misc]
    return {name: value for name, value in config.items() if name in arguments}


def require_fields(config: Mapping[str, Any], expected: Mapping[str, Any], file: Path | str) -> None:
    """Raises a ValueError for the first field of a configuration whose value is not supported.

    Args:
        expected: The only supported value of each field; a missing field counts as that value.
    """
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{file}: `{name}` must be {value!r}, got {shown(config[name])}.")


def check_fields(model_class: type, settings: Mapping[str, Any], file: Path | str) -> None:
    """Raises a ValueError for the first field of a configuration whose type is not that of the model class's argument."""
    for name, hint in typing.get_type_hints(model_class.__init__).items():  # type: ignore[misc]
        if name in settings and not _fits(settings[name], hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{file}: `{name}` must be of the type {expected}, got {shown(settings[name])}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if origin in (tuple, list, collections.abc.Sequence) or hint in (tuple, list):
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value if arguments)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    return True


def check_sizes(settings: Mapping[str, Any], checkpoint: Checkpoint, file: Path) -> None:
    """Raises a ValueError for the first number of a config.json that is too large for a model with these weights.

    Call it before anything is built: reading a configuration alone, transformers creates lists and tables of these lengths.
    """
    count, elements = len(checkpoint.shapes), checkpoint.num_elements
    largest = max(_LARGEST_COUNT, count)
    for name, value in _numbers(settings):
        if abs(value) >= 2**63:
            raise ValueError(f"{file}: `{name}` must be an integer of 64 bits, got {shown(value)}.")
        if not 0 <= value <= largest and _COUNTS.search(name) and not _SIZES.search(name):
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
    """All integers in a JSON value, each with the name of the innermost field that holds it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def stock_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the fields that make transformers look for code: attention kernels and custom classes."""
    return {
        name: stock_settings(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in _IGNORED
    }


def stock_config(config_class: Any, settings: Mapping[str, Any], file: Path) -> Any:
    """A configuration object of transformers, from the output of `stock_settings`.

    Args:
        config_class: Its class. If the settings are those of a larger model, such as a CLIP, its part is taken from them.
        settings: The content of config.json.
        file: Its path, for errors.

    Raises:
        ValueError: If the class rejects the settings, naming the file.
    """
    inner = settings.get(config_class.base_config_key) if settings.get("model_type") != config_class.model_type else None
    with one_sentence(f"{file} makes no {config_class.__name__}"):
        return config_class.from_dict(dict(inner if isinstance(inner, dict) else settings))
