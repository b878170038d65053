"""`diffusers-infogain convert`."""

from __future__ import annotations

import argparse

import torch

from ..checkpoints import convert as library
from ..loading import pipeline_class
from ..pipeline_infogain_text import InfoGainTextPipeline
from . import common


def convert(args: argparse.Namespace) -> None:
    """Writes a published checkpoint as a diffusers folder, and prints the tensors, parameters and size of its models."""
    cls = InfoGainTextPipeline if args.text else pipeline_class(args.source)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    options = common.loading_arguments(args, cls)
    models = library.convert(cls, args.source, args.target, dtype, int(args.max_shard_size * 1e9), **options)
    print(f"{args.source} as {cls.__name__}, written to {args.target}:")
    for name, model in models.items():
        size = f"{model.num_parameters / 1e6:.1f} M parameters, {model.num_bytes / 1e9:.2f} GB"
        print(f"  {name}: {model.num_tensors} tensors, {size}")
    print("Every key and shape fitted, and each model gives the same output as before. Load it with:")
    print(f"  {cls.__name__}.from_pretrained({str(args.target)!r})")
