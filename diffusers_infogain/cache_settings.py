"""The approximate caches of image pipelines by name, with their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .printing import shown

CACHE_FORMS = (
    "None, 'context:TOLERANCE' with a share from 0 to 1, or 'ml_cache:RATIO:WARMUP:INTERVAL' with two shares from 0 to 1 and an "
    "integer from 1 on, where numbers may be left out at the end"
)


@dataclass(frozen=True)
class ContextCache:
    """Reuses the keys and values of known tokens, in the manner of ReCAP (arXiv 2505.19089).

    A row of the network runs the masked positions and the tokens that have changed since the last full row of its sample.

    Attributes:
        tolerance: The share of the image's tokens that may change until a full row is run again; 0 for full rows only.
    """

    tolerance: float = 0.25


@dataclass(frozen=True)
class MaxLogitCache:
    """Lumina-DiMOO's ML-Cache: a row runs the positions whose largest logit was smallest, and reuses the logits of the others.

    The defaults are its authors'.

    Attributes:
        ratio: The share of the positions that a row reuses.
        warmup: In this share of the steps, the first ones, all rows are full.
        interval: After that the rows of every `interval`-th step are full.
    """

    ratio: float = 0.9
    warmup: float = 0.3
    interval: int = 5


def parse_cache(text: object) -> ContextCache | MaxLogitCache | None:
    """The cache that `approximate_cache` of an image pipeline's call names, such as "context:0.25".

    Raises:
        ValueError: For any other text.
    """
    if text is None:
        return None
    name, *numbers = text.split(":") if isinstance(text, str) else ("",)
    kinds = {"context": (float,), "ml_cache": (float, float, int)}.get(name, ())
    try:
        values: list[Any] = [kind(number) for kind, number in zip(kinds, numbers, strict=False)]
    except ValueError:
        values = [-1]
    shares_fit = all(0 <= value <= 1 for value in values[:2])
    if not kinds or len(numbers) > len(kinds) or not shares_fit or not all(value >= 1 for value in values[2:]):
        raise ValueError(f"`approximate_cache` must be {CACHE_FORMS}, got {shown(text)}.")
    return (ContextCache if name == "context" else MaxLogitCache)(*values)
