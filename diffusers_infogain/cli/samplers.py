"""`diffusers-infogain samplers`."""

from __future__ import annotations

import argparse

from ..choices import PRESET_DESCRIPTIONS, SAMPLER_DESCRIPTIONS


def samplers(args: argparse.Namespace) -> None:
    """Prints the samplers and presets with their descriptions."""
    width = max(map(len, (*SAMPLER_DESCRIPTIONS, *PRESET_DESCRIPTIONS)))
    for title, descriptions in (("Samplers", SAMPLER_DESCRIPTIONS), ("Presets", PRESET_DESCRIPTIONS)):
        print(f"{title} (--{'sampler' if title == 'Samplers' else 'preset'}):")
        for name, description in descriptions.items():
            print(f"  {name:{width}}  {description}")
