"""Short descriptions of values, for messages and for `repr`."""

from __future__ import annotations

from typing import Any

_MAX_LENGTH = 200
_MAX_ITEMS = 8


def shown(value: object) -> str:
    """A value on one line: its repr, cut off if it is long; tensors, arrays and PIL images by their type and size."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of {value.dtype} {tuple(value.shape)}"
    if hasattr(value, "mode") and hasattr(value, "size") and hasattr(value, "getbands"):
        return f"a PIL image of mode {value.mode!r} and {value.size[0]} x {value.size[1]} pixels"
    if isinstance(value, (list, tuple)) and len(value) > _MAX_ITEMS:
        return f"{type(value).__name__} of {len(value)}, {', '.join(map(shown, value[:2]))}, ..."
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer with more digits than Python prints
        text = f"an {type(value).__name__} with too many digits to show"
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def summary(output: Any) -> str:
    """The fields of an output, one per line."""
    lines = [f"  {name}: {_field(value)}" for name, value in vars(output).items()]
    return "\n".join([f"{type(output).__name__}:", *lines])


def _field(value: Any) -> str:
    if isinstance(value, list) and value and hasattr(value[0], "getbands"):
        sizes = sorted({image.size for image in value})
        return f"{len(value)} PIL images of {' and '.join(f'{width}x{height}' for width, height in sizes)}"
    return shown(value).replace("\n", "\n  ")
