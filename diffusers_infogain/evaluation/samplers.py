"""Samplers as commands and tables write them ("maskgit:entropy_bound=0.25"): parsed, and put into words for pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..cache_settings import parse_cache
from ..choices import PRESETS
from ..guidance import check_guidance
from ..rules import SAMPLERS
from ..scheduling_infogain import InfoGainScheduler
from ..settings import RETRY_LIMITS, SETTINGS

SEARCHES = ("num_beams", "num_runs")
"""Settings of a sampler that are not the scheduler's but arguments of the pipeline's call."""

GUIDANCE = ("guidance_scale", "guidance_schedule", "guidance_interval", "guided_lookahead")
"""Others of these, for images only."""

CACHE = "approximate_cache"
"""One more."""

OF_TEXT = ("guidance_scale", "eos_penalty", "postpone_eos")
"""Those of a text pipeline's call, besides the searches."""

LOOKS_BACK = (*RETRY_LIMITS, "corrector")
"""The settings by which a sampler goes back on what it has decoded; None where it does not."""

DEFAULT = "default"
"""The name that stands for the pipeline's own sampler, with its own settings."""


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler: the name it is written as, settings of the scheduler, and arguments of the pipeline's call."""

    name: str
    scheduler: dict[str, Any] = field(hash=False)
    call: dict[str, Any] = field(hash=False)

    @property
    def looks_ahead(self) -> bool:
        """Whether it compares candidates by a lookahead. "default" does, unless `for_pipeline` filled in other settings."""
        return SAMPLERS[self.scheduler.get("sampler", "info_gain")].looks_ahead

    def for_pipeline(self, config: Mapping[str, Any]) -> SamplerSpec:
        """Fills in the settings of the pipeline's scheduler if the sampler is "default"; any other sampler is returned as it is.

        Args:
            config: The configuration of the pipeline's own scheduler.
        """
        if self.name.partition(":")[0] != DEFAULT:
            return self
        # The configuration of another scheduler class contributes the settings that both classes have.
        own = InfoGainScheduler.from_config(dict(config)).config
        return replace(self, scheduler={**{name: own[name] for name in SETTINGS}, **self.scheduler})


def parse_sampler(text: str, *, guided: bool = True, call: Sequence[str] = ()) -> SamplerSpec:
    """Parses a sampler or preset with settings after a colon: "maskgit", "paper", "info_gain:certainty=uniform,gain_weight=0.5".

    "default" stands for the pipeline's own sampler (see `SamplerSpec.for_pipeline`). A pair is written start:end, as in
    "maskgit:choice_temperature=4:0". The settings "num_beams" and "num_runs" search with the sampler; those of guidance and
    "approximate_cache" are arguments of an image pipeline's call, such as "guidance_interval=0.25:1".

    Args:
        guided: Whether settings of guidance and of caches are allowed: for images, but not for text and exact models.
        call: Further arguments of the pipeline's call that are allowed as settings.

    Raises:
        ValueError: For an unknown name or setting, a setting that is not of the form key=value, or a wrong one of guidance or
            of a cache. The scheduler checks the values of its own.
    """
    name, _, rest = text.partition(":")
    if name not in SAMPLERS and name not in PRESETS:
        raise ValueError(f"A sampler must be one of {', '.join((*SAMPLERS, *PRESETS))}, got {name!r} in {text!r}.")
    settings: dict[str, Any] = {} if name == DEFAULT else dict(PRESETS[name]) if name in PRESETS else {"sampler": name}
    of_call = (*SEARCHES, *((*GUIDANCE, CACHE) if guided else ()), *call)
    known = (*SETTINGS, *of_call)
    for pair in rest.split(",") if rest else ():
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"A sampler's settings must have the form key=value,key=value, got {pair!r} in {text!r}.")
        if key not in known:
            raise ValueError(f"A sampler's setting must be one of {', '.join(known)}, got {key!r} in {text!r}.")
        settings[key] = value if key == CACHE else _value(value)
    given = {key: settings.pop(key) for key in of_call if key in settings}
    check_guidance(**{key: given[key] for key in GUIDANCE if key in given})
    parse_cache(given.get(CACHE))
    return SamplerSpec(text, settings, given)


def check_recorded_sampler(text: str, where: str) -> None:
    """Raises a ValueError that names the place in a file if its sampler does not exist."""
    try:
        parse_sampler(text, call=OF_TEXT)
    except ValueError as error:
        raise ValueError(f"{where} has an unknown sampler. {error}") from None


def _value(text: str) -> Any:
    if ":" in text:
        return [_value(part) for part in text.split(":")]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_SAMPLERS = {
    "default": "lookahead (default)",
    "fast": "fast (greedy)",
    "best": "lookahead (best)",
    "text": "lookahead (text)",
    "text_fast": "fast for text (greedy)",
    "paper": "lookahead as in the paper",
    "info_gain": "lookahead",
    "lookum": "LookUM",
    "maskgit": "MaskGIT",
    "maskgit_halton": "MaskGIT with Halton order",
    "titok": "TiTok",
    "titok_l32": "TiTok-L-32 as published",
    "titok_b64": "TiTok-B-64 as published",
    "titok_s128": "TiTok-S-128 as published",
    "maskgen": "MaskGen as published",
    "halton": "Halton order",
    "uniform": "random order",
    "confidence": "confidence",
    "entropy": "lowest entropy",
    "margin": "margin",
    "left": "left to right",
    "klass": "KLASS",
    "klass_parallel": "parallel KLASS",
    "confidence_parallel": "parallel confidence",
    "factor_parallel": "Fast-dLLM factor",
    "frechet_parallel": "Fast-dLLM++",
    "pivot": "pivot",
    "pc_sampler": "PC-Sampler",
    "entropy_bound": "entropy-bound rule",
}
_PHRASES = {
    "num_runs": "best of {}",
    "num_tries": "at most {} tries",
    "retry_above_nats": "tried anew above {} nats",
    "retry_below_nats": "tried anew below {} nats",
    "retry_below_sigmas": "tried anew below {} sigmas",
    "top_p": "top-p {}",
    "top_k": "top-k {}",
}
_GAINS = {"sum": "summed gain", "mean": "mean gain", "kl": "KL gain"}


def describe_sampler(text: str, *, bounds: bool = True) -> str:
    """A sampler, written as for `parse_sampler`, in words: "maskgit:entropy_bound=0.25" is "MaskGIT, entropy bound 0.25".

    Args:
        bounds: Whether to include the value of an entropy bound above 0; without it samplers that differ in it have one name.
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
    if key == "lazy_threshold" and value == "null":
        return "all candidates"
    if key == "pc_frequencies":
        return "token frequencies"
    if key in ("num_beams", "num_candidates"):
        return f"{value} {key.removeprefix('num_')}"
    if key == CACHE:
        return f"cache {value}"
    if key == "guided_lookahead":
        return "guided lookahead" if value == "true" else "unguided lookahead"
    words = _PHRASES.get(key)
    if words is not None:
        return words.format(value)
    return f"{key} {value.replace(':', ' to ')}".replace("_", " ")
