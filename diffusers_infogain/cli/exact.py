"""`diffusers-infogain exact`."""

from __future__ import annotations

import argparse


def exact(args: argparse.Namespace) -> None:
    """Prints the table of all samplers, or of those that are given, on models with exact marginals."""
    from ..evaluation.exact import compare_exact, compare_samplers
    from ..evaluation.samplers import parse_sampler
    from ..evaluation.splits import seed_of_split

    seeds = [seed_of_split(seed, args.split) for seed in args.seeds]
    if args.samplers is None:
        print(compare_exact(args.num_samples, seeds))
    else:
        print(compare_samplers([parse_sampler(name, guided=False) for name in args.samplers], args.num_samples, seeds))
