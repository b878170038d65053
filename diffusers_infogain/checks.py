"""Checks of what users give: numbers, names and types. One sentence says what is wrong, what is allowed and what was given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from .printing import shown

if TYPE_CHECKING:
    import torch

LARGEST_INTEGER = 2**63 - 1
"""What a tensor of 64-bit integers holds."""
LARGEST_NUMBER = 1e9
"""Beyond it settings mean nothing that a smaller one would not, and float32 overflows in products."""
COLDEST = 1e-6
"""The lowest temperature above 0: logits divided by less overflow in float32, and only the most probable token is left."""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is a Python integer and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite Python number and no bool."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def check_integer(name: str, value: object, lowest: int, highest: int = LARGEST_INTEGER, *, optional: bool = False) -> None:
    """Raises a ValueError that names the argument if the value is no integer in [lowest, highest], nor None where `optional`."""
    if (optional and value is None) or (is_integer(value) and lowest <= value <= highest):
        return
    above = is_integer(value) and value > highest
    bounds = f"from {lowest} to {highest}" if above else f">= {lowest}"
    raise ValueError(f"`{name}` must be an integer {bounds}{' or None' if optional else ''}, got {shown(value)}.")


def check_number(
    name: str,
    value: object,
    lowest: float,
    highest: float = LARGEST_NUMBER,
    *,
    exclusive: bool = False,
    optional: bool = False,
) -> None:
    """Raises a ValueError that names the argument if the value is no number in [lowest, highest], nor None where `optional`.

    Args:
        exclusive: Whether `lowest` itself is not allowed.
    """
    if optional and value is None:
        return
    if is_number(value) and lowest <= value <= highest and not (exclusive and value == lowest):
        return
    bounded = highest != LARGEST_NUMBER or (is_number(value) and value > highest)
    opening, sign = ("(", ">") if exclusive else ("[", ">=")
    bounds = f"in {opening}{lowest:g}, {highest:g}]" if bounded else f"{sign} {lowest:g}"
    raise ValueError(f"`{name}` must be a number {bounds}{' or None' if optional else ''}, got {shown(value)}.")


def check_temperature(name: str, value: Any, *, positive_ends: bool = False) -> tuple[float, float]:
    """A temperature, or a pair (start, end) of them, as a pair.

    Args:
        positive_ends: Whether the ends of a pair must be above 0.

    Raises:
        ValueError: If it is neither, or out of range.
    """
    is_pair = isinstance(value, (tuple, list))
    pair = tuple(value) if is_pair else (value, value)
    ends_at_zero = positive_ends and is_pair and not all(is_number(end) and end > 0 for end in pair)
    if len(pair) != 2 or ends_at_zero:
        above = " of numbers > 0" if positive_ends else ""
        raise ValueError(f"`{name}` must be a number or a pair (start, end){above}, got {shown(value)}.")
    for temperature in pair:
        check_number(name, temperature, 0)
        if 0 < temperature < COLDEST:
            raise ValueError(f"`{name}` must be 0 or at least {COLDEST:g}, got {shown(value)}.")
    return pair


def check_choice(name: str, value: object, allowed: Sequence[str], *, optional: bool = False) -> None:
    """Raises a ValueError that names the argument if the value is not one of these strings, nor None where `optional`."""
    if (optional and value is None) or (isinstance(value, str) and value in allowed):
        return
    raise ValueError(f"`{name}` must be one of {', '.join(allowed)}{' or None' if optional else ''}, got {shown(value)}.")


def check_known(owner: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises a TypeError for the first name that is not known, with the closest one."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"the closest is {close[0]!r}" if close else f"there are {', '.join(known)}"
            raise TypeError(f"{owner} has no setting {name!r}; {hint}.")


def check_bool(name: str, value: object) -> None:
    """Raises a ValueError that names the argument if the value is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def check_type(name: str, value: object, kinds: type | tuple[type, ...], described: str) -> None:
    """Raises a ValueError that names the argument if the value is of another type.

    Args:
        kinds: The types.
        described: How the message calls them, such as "a torch.Tensor or None".
    """
    if not isinstance(value, kinds):
        raise ValueError(f"`{name}` must be {described}, got {shown(value)}.")


def check_list(name: str, value: Any, kinds: type | tuple[type, ...], described: str) -> list[Any]:
    """The value as a list, if it is a non-empty list or tuple of items of these types.

    Args:
        kinds: The types of its items.
        described: How the message calls the whole, such as "a string or a non-empty list of strings".

    Raises:
        ValueError: If not, naming the argument.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, kinds) for item in value):
        return list(value)
    raise ValueError(f"`{name}` must be {described}, got {shown(value)}.")


def check_tensor(
    name: str, value: Any, ndims: Sequence[int], described: str, dtypes: Sequence[torch.dtype] | None = None
) -> None:
    """Raises a ValueError that names the argument if the value is no tensor, or one of other dimensions or another dtype.

    Args:
        ndims: The numbers of dimensions that it may have.
        described: How the message calls it, such as "a long tensor (batch, length)".
        dtypes: Those that it may have; by default all real numbers.
    """
    import torch  # the command line checks its flags without it

    fits = isinstance(value, torch.Tensor) and value.ndim in ndims
    if not (fits and (value.dtype in dtypes if dtypes is not None else not value.is_complex())):
        raise ValueError(f"`{name}` must be {described}, got {shown(value)}.")


def check_integers(name: str, value: Any, length: int) -> None:
    """Raises a ValueError that names the argument if the value is no long tensor (length,), and not None."""
    import torch

    fits = isinstance(value, torch.Tensor) and value.shape == (length,) and value.dtype == torch.long
    if value is not None and not fits:
        raise ValueError(f"`{name}` must be a tensor of {length} integers or None, got {shown(value)}.")


def check_grid(name: str, value: object) -> None:
    """Raises a ValueError that names the argument if the value is no pair of integers above 0, and not None."""
    if value is not None and not (isinstance(value, tuple) and len(value) == 2 and all(is_integer(v) and v > 0 for v in value)):
        raise ValueError(f"`{name}` must be a pair (height, width) of integers, or None, got {shown(value)}.")


def prompt_list(name: str, prompt: Any) -> list[str]:
    """A prompt or a non-empty list of prompts, as a list.

    Raises:
        ValueError: If it is anything else, naming the argument.
    """
    if isinstance(prompt, str):
        return [prompt]
    return check_list(name, prompt, str, "a string or a non-empty list of strings")


def check_search(num_beams: int, num_runs: int, callback: object, scheduler: Any) -> None:
    """Raises a ValueError for numbers below 1, both above 1, or a callback beside a search, which could not follow it.

    Args:
        scheduler: Beam search does without its retries and correctors, and no callback can follow retries.
    """
    for name, value in (("num_beams", num_beams), ("num_runs", num_runs)):
        check_integer(name, value, 1)
    if num_beams > 1 and num_runs > 1:
        raise ValueError(f"`num_beams` and `num_runs` must not both be above 1, got {num_beams} and {num_runs}.")
    if callback is not None and (num_beams > 1 or num_runs > 1):
        raise ValueError("`callback_on_step_end` must be None with `num_beams` or `num_runs` above 1.")
    if scheduler.retries and (callback is not None or num_beams > 1):
        name, allowed = ("num_beams", "1") if num_beams > 1 else ("callback_on_step_end", "None")
        raise ValueError(f"`{name}` must be {allowed} with a scheduler that begins unlikely samples anew (`retry_...`).")
    if num_beams > 1 and scheduler.config.corrector is not None:
        raise ValueError(f"`num_beams` must be 1 with the corrector {scheduler.config.corrector!r}, got {num_beams}.")


def check_device(name: str, value: Any) -> None:
    """Raises a ValueError that names the argument if the value is no device that torch can use here, and not None."""
    import torch

    try:
        torch.empty(0, device=value)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # torch's own differ by the device
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ValueError(f"`{name}` must be a device that torch can use here, or None, got {shown(value)}: {reason}") from None
