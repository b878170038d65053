"""Saved configurations of earlier versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rules import RULES, SAMPLERS
from .settings import SETTINGS


def as_saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration, written so that it means today what it meant when it was saved.

    Configurations without `lazy_threshold` looked at all candidates, and no sampler had a `top_p` of its own. Earlier ones used
    `position_temperature` for every rule's temperature (None for the rule's default), and `confidence_threshold` also for the
    threshold of the parallel samplers.
    """
    config = dict(config)
    if config.get("_class_name") == "InfoGainScheduler" and "lazy_threshold" not in config:
        top_p = 1.0 if config.get("top_p") is None else config["top_p"]
        earlier = {"certainty": "maskgit", "gain_reduction": "kl", "best_run_by": "cumulative_entropy"}
        config = earlier | config | {"lazy_threshold": None, "top_p": top_p}
    if "choice_temperature" in config or "position_temperature" not in config:
        return config
    # Values that are no strings are left to the constructor, which refuses them.
    sampler = SAMPLERS.get(str(config.get("sampler", SETTINGS["sampler"].default)))
    name = str(config.get("certainty", "maskgit"))
    rule = None if sampler is None else RULES.get(sampler.rule or name)
    temperature = config.pop("position_temperature")
    if rule is not None and temperature is not None:
        config[rule.temperature] = temperature
    if sampler is not None and sampler.ready is not None:
        threshold = config.pop("confidence_threshold", None)
        if threshold is not None:
            config["parallel_threshold"] = threshold
    return config
