"""How samplers look in pictures: a color and a marker for each name, the same in every picture of every command.

The colors are those of Okabe and Ito for the color-blind, without yellow, which is too light for white paper, and with a dark
red. Names that share a color have different markers, and so have those that are equally dark, for whoever prints in gray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

_VERMILION, _PURPLE, _BLACK, _BLUE = "#D55E00", "#CC79A7", "#000000", "#0072B2"
_SKY, _ORANGE, _GREEN, _DARK_RED = "#56B4E9", "#E69F00", "#009E73", "#882255"

LOOKS: dict[str, tuple[str, str]] = {
    "default": (_VERMILION, "o"),
    "text": (_VERMILION, "p"),
    "info_gain": (_VERMILION, "H"),
    "best": (_PURPLE, "P"),
    "lookum": (_PURPLE, "d"),
    "paper": (_BLACK, "*"),
    "llada": (_BLACK, "s"),
    "dream": (_BLACK, "^"),
    "sdar": (_BLACK, "D"),
    "trado": (_BLACK, "d"),
    "maskgit": (_BLUE, "s"),
    "maskgit_halton": (_BLUE, "D"),
    "showo": (_BLUE, "^"),
    "titok": (_BLUE, "P"),
    "titok_l32": (_BLUE, "v"),
    "titok_b64": (_BLUE, "<"),
    "titok_s128": (_BLUE, ">"),
    "maskgen": (_BLUE, "h"),
    "fast": (_SKY, "^"),
    "halton": (_SKY, "v"),
    "text_fast": (_SKY, ">"),
    "confidence": (_ORANGE, "D"),
    "confidence_parallel": (_ORANGE, "d"),
    "margin": (_ORANGE, "h"),
    "pivot": (_GREEN, "X"),
    "left": (_GREEN, "<"),
    "pc_sampler": (_GREEN, ">"),
    "entropy": (_DARK_RED, "v"),
    "entropy_bound": (_DARK_RED, "h"),
    "uniform": (_DARK_RED, "X"),
    "ancestral": (_DARK_RED, "o"),
    "klass": (_DARK_RED, "P"),
    "klass_parallel": (_DARK_RED, "p"),
    "factor_parallel": (_DARK_RED, "<"),
    "frechet_parallel": (_DARK_RED, ">"),
}
"""Color and marker by the name of a sampler or preset."""
_OTHER = ("#5A5A5A", "o")
"""Of rules that are not the package's own."""

OTHERS = "0.7"
"""The color of what a picture does not name."""
_FILLS = ("full", "none", "left", "bottom")
_LINES = ("-", "--", ":", "-.")


def look_of(sampler: str) -> tuple[str, str]:
    """The color and the marker of a sampler, written as for `parse_sampler`; its settings do not matter."""
    return LOOKS.get(sampler.partition(":")[0], _OTHER)


def styles(samplers: Sequence[str]) -> list[dict[str, Any]]:
    """What matplotlib draws each sampler of a picture with. One with settings has the color and the marker of its name, but
    filled in another way, and another line for each further one."""
    further: Counter[str] = Counter()
    found = []
    for index, sampler in enumerate(samplers):
        name = sampler.partition(":")[0]
        bare = sampler == name and sampler not in samplers[:index]
        further[name] += not bare
        number = 0 if bare else further[name]
        color, marker = look_of(name)
        look = {"color": color, "marker": marker, "fillstyle": _FILLS[number % 4], "linestyle": _LINES[number % 4]}
        found.append({**look, "markerfacecoloralt": "white", "markersize": 10 if marker == "*" else 7})
    return found


def ink(color: str) -> tuple[float, float, float]:
    """A darker shade of a color, in which text can be read on white."""
    return tuple(0.65 * int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]
