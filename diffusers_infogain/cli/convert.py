"""`diffusers-infogain convert`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..checkpoints.published import saved_class
from ..loading import pipeline_class
from ..pipeline_infogain_text import InfoGainTextPipeline
from . import common


def convert(args: argparse.Namespace) -> None:
    """A published checkpoint as a diffusers folder in safetensors: every tensor checked, and the result tested."""
    kind: Any = InfoGainTextPipeline if args.text else pipeline_class(args.source)
    if not hasattr(kind, "open_published") or args.source == "demo-text" or saved_class(args.source) == kind.__name__:
        raise ValueError(f"{args.source!r} is a diffusers folder for {kind.__name__} already: load it as it is.")
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    options: dict[str, Any] = common.loading_arguments(args, kind.open_published)
    published = kind.open_published(args.source, **options)
    sizes = published.write(args.target, dtype, int(args.max_shard_size * 1e9))
    print(f"{args.source} as {kind.__name__}, written to {args.target}:")
    for name, source in published.models.items():
        count = sum(value.numel() for value in source.skeleton.parameters())
        print(f"  {name}: {len(source.keys)} tensors, {count / 1e6:.1f} M parameters, {sizes[name] / 1e9:.2f} GB")
    print("Every key and shape fitted, and each model gives the same output as before. Load it with:")
    print(f"  {kind.__name__}.from_pretrained({str(args.target)!r})")
