"""`diffusers-infogain export`."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from ..exporting import export_pipeline
from ..loading import pipeline_class
from ..model_cards import licence_of
from ..scheduling_infogain import InfoGainScheduler
from . import common


def export(args: argparse.Namespace) -> None:
    """Writes a repository that runs without this package, and prints what is in it and the lines that load it."""
    settings = common.scheduler_settings(args)
    cls = pipeline_class(args.model)
    begun = time.monotonic()
    dtype: dict[str, Any] = {} if args.dtype is None else {"dtype": getattr(torch, args.dtype)}
    pipe = cls.from_pretrained(args.model, **dtype, **common.loading_arguments(args, cls))
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    if args.guidance_scale is not None:
        if not hasattr(pipe, "default_guidance_scale"):
            raise ValueError(f"--guidance-scale does not apply to {cls.__name__}, which this checkpoint is for.")
        pipe.register_to_config(default_guidance_scale=args.guidance_scale)
    written = export_pipeline(
        pipe,
        args.target,
        license=args.license or licence_of(args.model),
        base_model=args.base_model,
        max_shard_size=f"{args.max_shard_size:g}GB",
    )
    size = f"{written.num_bytes / 1e6:.1f} MB, of which {len(written.modules)} Python files of {written.code_bytes / 1e3:.0f} kB"
    print(
        f"{args.model} as {cls.__name__}, written to {args.target} in {time.monotonic() - begun:.1f} s: {size} are all of the "
        "code. Load it with:"
    )
    print(f"  folder = {str(args.target)!r}")
    print("  DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)")
