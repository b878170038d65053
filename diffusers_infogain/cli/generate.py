"""`diffusers-infogain generate`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import PIL.Image

from ..files import save_png, writable_folder
from ..scheduling_infogain import InfoGainScheduler
from . import common


def generate(args: argparse.Namespace) -> None:
    """Images from prompts, as PNG files that carry their settings."""
    common.require_positive(args, "num_images", "batch_size")
    prompts, folder = common.prompts_of(args), writable_folder(args.output)
    pipe = common.load_pipeline(args)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **common.scheduler_settings(args))
    call = common.call_arguments(args, pipe)
    every = [prompt for prompt in prompts for _ in range(args.num_images)]
    seeds = [args.seed + i for _ in prompts for i in range(args.num_images)]
    shared = {**common.model_settings(args), **call, "scheduler": common.scheduler_config(pipe)}

    def save(index: int, image: PIL.Image.Image) -> None:
        prompt, seed = every[index], seeds[index]
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        save_png(image, folder / f"{index:05d}-{words}-seed{seed}.png", {"prompt": prompt, "seed": seed, **shared})

    result = common.generate_images(pipe, every, seeds, args.batch_size, "generate", save, **call)
    if args.grid:
        from ..visualization import GridCell, GridRow, labelled_grid

        per_prompt = [result.images[i : i + args.num_images] for i in range(0, len(every), args.num_images)]
        rows = [
            GridRow(f"seed {args.seed + i}", [], [GridCell(images[i]) for images in per_prompt]) for i in range(args.num_images)
        ]
        save_png(labelled_grid(prompts, rows), folder / "grid.png", {"prompts": prompts, "seed": args.seed, **shared})
    count = len(result.images)
    print(
        f"{count} images in {result.seconds:.1f} s ({result.seconds / count:.2f} s each), "
        f"{result.model_rows.double().mean():.1f} model rows and {result.cumulative_entropy.mean():.1f} nats of cumulative "
        f"entropy per image. Written to {folder}."
    )


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's flags."""
    command.add_argument("prompts", nargs="*", help="what to draw")
    command.add_argument("--prompts-file", type=Path, help="text file with one prompt per line, or JSONL with the key 'prompt'")
    common.add_model_flags(command)
    command.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the images (default: outputs)")
    command.add_argument("--grid", action="store_true", help="also write all images into one picture, grid.png")
    command.add_argument("--num-images", type=int, default=1, help="images per prompt, with seeds one after the other")
    common.add_call_flags(command)
    common.add_machine_flags(command)
    common.add_sampler_flags(command)
