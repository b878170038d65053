"""Saved configurations of earlier versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rules import RULES, SAMPLERS
from .settings import SETTINGS


def with_split_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with one name for each meaning of `position_temperature` and `confidence_threshold`.

    Configurations written before these were split used `position_temperature` for every rule's temperature (None for the rule's
    default), and `confidence_threshold` also for the threshold of the parallel samplers.
    """
    config = dict(config)
    if "choice_temperature" in config or "position_temperature" not in config:
        return config
    # Values that are no strings are left to the constructor, which refuses them.
    sampler = SAMPLERS.get(str(config.get("sampler", SETTINGS["sampler"].default)))
    name = str(config.get("certainty", SETTINGS["certainty"].default))
    rule = None if sampler is None else RULES.get(sampler.rule or name)
    temperature = config.pop("position_temperature")
    if rule is not None and temperature is not None:
        config[rule.temperature] = temperature
    if sampler is not None and sampler.ready is not None:
        threshold = config.pop("confidence_threshold", None)
        if threshold is not None:
            config["parallel_threshold"] = threshold
    return config
