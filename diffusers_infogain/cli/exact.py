"""`diffusers-infogain exact`."""

from __future__ import annotations

import argparse


def exact(args: argparse.Namespace) -> None:
    """Prints the table of all samplers on models with exact marginals."""
    from ..evaluation.exact import compare_exact

    print(compare_exact(args.num_samples, args.seeds))
