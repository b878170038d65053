"""How values look in messages and in a terminal: short, whatever they hold."""

from __future__ import annotations

from typing import Any

_LONGEST = 200
_ITEMS = 8


def shown(value: object) -> str:
    """A value on one line: its repr, cut where it is long; tensors and arrays by dtype and shape."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of {value.dtype} {tuple(value.shape)}"
    if isinstance(value, (list, tuple)) and len(value) > _ITEMS:
        return f"{type(value).__name__} of {len(value)}, {', '.join(map(shown, value[:2]))}, ..."
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        text = f"an {type(value).__name__} of more digits than can be shown"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def summary(output: Any) -> str:
    """An output by the names of what it holds, a line each."""
    lines = [f"  {name}: {_part(value)}" for name, value in vars(output).items()]
    return "\n".join([f"{type(output).__name__}:", *lines])


def _part(value: Any) -> str:
    if isinstance(value, list) and value and hasattr(value[0], "getbands"):
        sizes = sorted({image.size for image in value})
        return f"{len(value)} PIL images of {' and '.join(f'{width}x{height}' for width, height in sizes)}"
    return shown(value).replace("\n", "\n  ")
