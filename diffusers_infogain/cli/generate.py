"""`diffusers-infogain generate`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import PIL.Image

import diffusers_infogain

from ..editing import EditArguments
from ..evaluation.identity import scheduler_record
from ..evaluation.runs import generate_images
from ..image_files import open_image, read_png_metadata, save_png
from ..output_folders import owned, unused
from ..pictures import Picture
from ..scheduling_infogain import InfoGainScheduler
from . import common


def generate(args: argparse.Namespace) -> None:
    """Generates images and writes each as a PNG file with its settings."""
    prompts = common.given_prompts(args)
    settings = common.scheduler_settings(args)
    edit, files = _edit_arguments(args)
    with owned(args.output, main=args.processes.is_main):
        _generate(args, prompts, settings, edit, files)


def _edit_arguments(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the call that edit an image, checked before a model is loaded, and how files record its input.

    Raises:
        ValueError: For flags that do not fit together, or a file that is no image.
    """
    images = common.edited_images(args.image, args.mask)
    settings = {name: getattr(args, name) for name in common.EDIT_SETTINGS}
    EditArguments(**images, **settings)
    if args.image is None:
        return {}, {}
    names = {name: file.name for name, file in (("image", args.image), ("mask_image", args.mask)) if file is not None}
    return {**images, **settings}, {**names, **settings}


def _generate(
    args: argparse.Namespace, prompts: list[str], settings: dict[str, Any], edit: dict[str, Any], files: dict[str, Any]
) -> None:
    folder = args.output
    pipe = common.load_pipeline(args)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    call = common.call_arguments(args, pipe)
    task = common.task_arguments(args, pipe)
    style = task.pop("style_image", None)
    call |= task
    if style is not None:
        edit, files = {**edit, "style_image": style}, {**files, "style_image": args.style_image.name}
    repeated = [prompt for prompt in prompts for _ in range(args.num_images)]
    seeds = [args.seed + i for _ in prompts for i in range(args.num_images)]
    shared = {
        **common.identity(args, pipe),
        "version": diffusers_infogain.__version__,
        **call,
        **files,
        "scheduler": scheduler_record(pipe.scheduler),
    }

    def save(index: int, image: PIL.Image.Image) -> str:
        prompt, seed = repeated[index], seeds[index]
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        path = folder / f"{index:05d}-{words}-seed{seed}.png"
        return str(save_once(image, path, {"prompt": prompt, "seed": seed, **shared}, trace_of(image)))

    args.processes.from_main()  # which owns the folder now
    result = generate_images(pipe, repeated, seeds, args.batch_size, "generate", save, args.processes, **call, **edit)
    if not args.processes.is_main:
        return
    if args.grid:
        from ..visualization import GridCell, GridRow, labelled_grid

        images = [open_image(Path(file)) for file in result.images]
        per_prompt = [images[i : i + args.num_images] for i in range(0, len(repeated), args.num_images)]
        rows = [
            GridRow(f"seed {args.seed + i}", [], [GridCell(of_prompt[i]) for of_prompt in per_prompt])
            for i in range(args.num_images)
        ]
        save_once(labelled_grid(prompts, rows), folder / "grid.png", {"prompts": prompts, "seed": args.seed, **shared})
    count = len(result.images)
    print(
        f"{count} images in {result.seconds:.1f} s ({result.seconds / count:.2f} s each), "
        f"{result.num_states.double().mean():.1f} states, {result.num_evaluations.double().mean():.1f} NFE and "
        f"{result.cumulative_entropy.mean():.1f} nats of cumulative entropy per image. Written to {folder}."
    )


def trace_of(image: PIL.Image.Image) -> dict[str, Any] | None:
    """How an image was decoded, as it records it itself."""
    return image.settings.get("trace") if isinstance(image, Picture) else None


def save_once(image: PIL.Image.Image, path: Path, metadata: dict[str, Any], trace: dict[str, Any] | None = None) -> Path:
    """Writes a PNG and returns its path; if the file has an image with other settings, the name gets a number (-2, -3, ...).

    Args:
        trace: How it was decoded, which is no setting.
    """

    def same(found: Path) -> bool:
        return {**read_png_metadata(found), "trace": None} == {**json.loads(json.dumps(metadata)), "trace": None}

    path = unused(path, same)
    save_png(image, path, metadata if trace is None else {**metadata, "trace": trace})
    return path
