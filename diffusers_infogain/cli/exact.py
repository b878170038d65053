"""`diffusers-infogain exact`."""

from __future__ import annotations

import argparse

from . import common


def exact(args: argparse.Namespace) -> None:
    """The table of all samplers on models with exact marginals."""
    from ..evaluation.exact import compare_exact

    common.require_positive(args, "num_samples")
    print(compare_exact(args.num_samples, args.seeds))


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's flags."""
    command.add_argument("--num-samples", type=int, default=200, help="per sampler and task (default: 200)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
