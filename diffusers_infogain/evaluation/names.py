"""Samplers in words, for pictures; tables name them as they are typed."""

from __future__ import annotations

from .comparison import parse_sampler

_SAMPLERS = {
    "default": "lookahead (default)",
    "paper": "lookahead as in the paper",
    "info_gain": "lookahead",
    "lookum": "LookUM",
    "maskgit": "MaskGIT",
    "maskgit_halton": "MaskGIT with Halton order",
    "halton": "Halton order",
    "uniform": "random order",
    "confidence": "confidence",
    "entropy": "lowest entropy",
    "margin": "margin",
    "klass": "KLASS",
    "klass_parallel": "parallel KLASS",
    "confidence_parallel": "parallel confidence",
    "pivot": "pivot",
    "pc_sampler": "PC-Sampler",
    "entropy_bound": "entropy-bound rule",
}
_GAINS = {"sum": "summed gain", "mean": "mean gain", "kl": "KL gain"}


def describe_sampler(text: str, *, bounds: bool = True) -> str:
    """The sampler of `comparison.parse_sampler` in words: "maskgit:entropy_bound=0.25" is "MaskGIT, entropy bound 0.25".

    Args:
        bounds: Whether to tell how large an entropy bound above 0 is; otherwise samplers that differ in it are called the same.
    """
    name, _, rest = text.partition(":")
    words = [_SAMPLERS.get(name, name.replace("_", " "))]
    for key, _, value in (pair.partition("=") for pair in rest.split(",") if pair):
        words.append(_setting(key, value, bounds))
    return ", ".join(words)


def _setting(key: str, value: str, bounds: bool) -> str:
    if key == "entropy_bound":
        if value in ("0", "0.0"):
            return "no entropy bound"
        return f"entropy bound {value}" if bounds else "entropy bound"
    if key == "gain_reduction":
        return _GAINS.get(value, value)
    if key == "certainty":
        return f"proposals by {_SAMPLERS.get(value, value)}"
    if key == "pc_frequencies":
        return "token frequencies"
    if key in ("num_beams", "num_candidates"):
        return f"{value} {key.removeprefix('num_')}"
    if key == "num_runs":
        return f"best of {value}"
    return f"{key.replace('_', ' ')} {value.replace(':', ' to ')}"


# Wong's palette for the color-blind, less its yellow, which is too light for lines, and some grays.
_COLORS = {
    "maskgit": "#0072B2",
    "pivot": "#009E73",
    "confidence": "#E69F00",
    "halton": "#56B4E9",
    "uniform": "#8A8A8A",
    "entropy": "#7A5195",
    "pc_sampler": "#004D40",
    "sum": "#D55E00",
    "kl": "#CC79A7",
    "mean": "#000000",
}
_OTHER_COLOR = "#5A5A5A"


def color_of(text: str) -> str:
    """A sampler's color, the same in every picture: by its gain where it looks ahead, else by its rule."""
    spec = parse_sampler(text)
    if spec.looks_ahead:
        return _COLORS.get(spec.scheduler.get("gain_reduction", "kl"), _OTHER_COLOR)
    return _COLORS.get(spec.scheduler["sampler"], _OTHER_COLOR)
