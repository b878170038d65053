"""The settings of lm-eval's requests for texts. Needs no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import check_integer, check_number

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names that tasks have for the number of new tokens."""

GENERATION_NAMES = ("until", *LENGTH_NAMES, "do_sample", "temperature", "top_k", "top_p")
"""The settings of a request that are supported."""


@dataclass(frozen=True)
class GenerationSettings:
    """The checked settings of a request.

    Attributes:
        until: The text ends before the first of these strings.
        max_new_tokens: The number of masks behind the prompt.
        sampled: Whether the text is to be random, so that repeats of the request differ.
        scheduler: Settings of the scheduler that the request overrides.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampled: bool
    scheduler: tuple[tuple[str, Any], ...]


def generation_settings(given: Mapping[str, Any], max_gen_toks: int, greedy_tokens: bool = False) -> GenerationSettings:
    """Checks the settings of a request.

    As in lm-eval, a request is sampled if `do_sample` is true, or if it is missing and `temperature` is above 0. Without sampling
    `temperature`, `top_k` and `top_p` have no effect.

    Args:
        given: The request's `generation_kwargs`.
        max_gen_toks: The number of new tokens if they name none.
        greedy_tokens: Whether requests without sampling set the scheduler's `token_temperature` to 0.

    Raises:
        ValueError: For a setting that is not supported or has an impossible value, naming it.
    """
    unknown = [name for name in given if name not in GENERATION_NAMES]
    if unknown:
        allowed = ", ".join(GENERATION_NAMES)
        raise ValueError(f"The generation setting `{unknown[0]}` = {given[unknown[0]]!r} is not supported, only {allowed}.")
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"`until` must be a string or a list of strings, got {given['until']!r}.")
    lengths = {name: given[name] for name in LENGTH_NAMES if given.get(name) is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"`{'` and `'.join(lengths)}` must be the same number, got {', '.join(map(str, lengths.values()))}.")
    name, length = next(iter(lengths.items()), ("max_gen_toks", max_gen_toks))
    check_integer(name, length, 1)
    temperature, sampled = given.get("temperature"), given.get("do_sample")
    if sampled not in (None, True, False):
        raise ValueError(f"`do_sample` must be True, False or None, got {sampled!r}.")
    if temperature is not None:
        check_number("temperature", temperature, 0)
    if sampled is None:
        sampled = bool(temperature)
    scheduler: dict[str, Any] = {}
    if sampled:
        if temperature == 0:
            raise ValueError("`temperature` must be above 0 with `do_sample` = True, got 0.")
        # lm-eval's backends write "off" as 0 or -1
        scheduler = {key: given[key] for key in ("top_k", "top_p") if given.get(key) is not None}
        if scheduler.get("top_k") in (0, -1):
            scheduler["top_k"] = None
        scheduler |= {} if temperature is None else {"token_temperature": float(temperature)}
    elif greedy_tokens:
        scheduler = {"token_temperature": 0.0}
    return GenerationSettings(tuple(stop for stop in until if stop), length, bool(sampled), tuple(sorted(scheduler.items())))
