#!/usr/bin/env python
"""A rule of your own: every second position first.

python examples/new_rule.py

A rule scores every masked position of a step; larger is decoded earlier. Once registered it works as a `sampler`, and as the
`certainty` that proposes positions for the lookahead samplers.
"""

from __future__ import annotations

import argparse

import torch

from diffusers_infogain import InfoGainScheduler, load
from diffusers_infogain.rules import Step, rule


@rule("even_first")
def even_first(step: Step) -> torch.Tensor:
    """0 at even positions, -1 at odd ones, (M,)."""
    return -(step.masked.nonzero()[:, 1] % 2).float()


def is_right(equation: str) -> bool:
    """Whether, say, "M07*12=0001010100" holds: decimal factors and a binary product."""
    try:
        factors, product = equation.removeprefix("M").split("=")
        first, second = factors.split("*")
        return int(first) * int(second) == int(product, 2)
    except ValueError:
        return False


def main() -> None:
    """Writes equations with the bundled text model, from nothing but masks and two tokens per step, with three samplers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-texts", type=int, default=50, help="equations per sampler")
    num_texts = parser.parse_args().num_texts
    pipe = load("demo-text")
    masked = [pipe.tokenizer("M" + 16 * "_").input_ids] * num_texts
    for settings in (
        {"sampler": "confidence"},
        {"sampler": "even_first"},
        {"sampler": "info_gain", "certainty": "even_first"},
    ):
        pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, tokens_per_step=2, **settings)
        output = pipe(input_ids=masked, max_new_tokens=0, generator=torch.Generator().manual_seed(0))
        right = sum(map(is_right, output.texts))
        print(f"{' with '.join(settings.values())}: {right} of {num_texts} right, first {output.texts[0]}")


if __name__ == "__main__":
    main()
