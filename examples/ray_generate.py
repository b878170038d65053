#!/usr/bin/env python
"""Generates images on a Ray cluster: workers that each hold a pipeline, prompts in, PNG files that record how they were made out.

    pip install -c constraints.txt "ray[data]"
    python examples/ray_generate.py outputs/ray --prompts captions.txt --model amused/amused-512 --dtype float16 --sampler fast
    python examples/ray_generate.py outputs/ray --prompts captions.parquet --address auto  # on the cluster of `ray start --head`

Prompts come from a file as `diffusers-infogain evaluate` takes it, or from the column "prompt" of a .csv or .parquet file. As
with `evaluate`, image i has the seed `--seed` + i, and its file is images/000000.png and so on.

Batches never change, and each goes to one worker as a whole. So every image comes out as from a single process on the same kind
of machine, however many workers there are, and whichever of them are lost on the way: Ray has their batches made again. Only this
process writes files, so machines need not share a disk, and no image is there twice. Started again, it makes what is missing.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset

from diffusers_infogain import InfoGainScheduler, load
from diffusers_infogain.checks import check_integer, check_number
from diffusers_infogain.evaluation.prompts import ImageRequest, Prompt, read_prompts, requests
from diffusers_infogain.evaluation.runs import check_settings, finish
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.files import regular_file, replacing
from diffusers_infogain.image_files import read_png_metadata
from diffusers_infogain.output_folders import owned
from diffusers_infogain.pictures import Picture
from diffusers_infogain.processes import batches_of
from diffusers_infogain.progress import Progress, quiet_libraries

Batch = list[ImageRequest]


class Painter:
    """What a worker does: it loads a pipeline once, and makes one batch of images after the other."""

    def __init__(self, model: str, dtype: str, device: str, sampler: str, call: dict[str, Any]):
        quiet_libraries()
        self.pipe = load(model, dtype=getattr(torch, dtype)).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        own = self.pipe.scheduler.config
        spec = parse_sampler(sampler).for_pipeline(own)
        self.pipe.scheduler = InfoGainScheduler.from_config(own, **spec.scheduler)
        self.call = {**call, **spec.call}

    def __call__(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Makes the images of the files, prompts and seeds of a batch: a row with the bytes of a PNG for each."""
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
        images = self.pipe(batch["prompts"], generator=generators, **self.call).images
        return [
            {"file": file, "png": png(image, prompt)}
            for file, prompt, image in zip(batch["files"], batch["prompts"], images, strict=True)
        ]


def png(image: Picture, prompt: str) -> bytes:
    """The bytes of a file that records the settings and the trace of its image, and the prompt, which may stand for a class."""
    content = io.BytesIO()
    Picture.of(image, {"prompt": prompt, **image.settings}).save(content, "PNG")
    return content.getvalue()


def row_of(batch: Batch) -> dict[str, Any]:
    """What `Painter` takes."""
    return {
        "files": [request.file for request in batch],
        "prompts": [request.prompt.text for request in batch],
        "seeds": [request.seed for request in batch],
    }


def rows_of(batches: Sequence[Batch], painter: dict[str, Any], workers: int, cpus: int, gpus: float) -> Dataset:
    """A dataset of the images, made as they are consumed: rows with a "file" and the bytes "png".

    Args:
        painter: The arguments of `Painter`.
        workers: The number of actors, each with this many CPUs, hence threads, and GPUs of its own.
    """
    items = [row_of(batch) for batch in batches]
    DataContext.get_current().enable_progress_bars = False
    # One block, and so one task, per batch: what Ray does again when a worker is lost.
    return ray.data.from_items(items, override_num_blocks=len(items)).flat_map(
        Painter,
        fn_constructor_kwargs=painter,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )


def prompts_of(file: Path) -> list[Prompt]:
    """The prompts of a file, in its order.

    Raises:
        ValueError: For a file without prompts, or one that holds something else.
    """
    if file.suffix not in (".csv", ".parquet"):
        return read_prompts(file)
    regular_file(file)
    try:
        if file.suffix == ".csv":
            texts = pandas.read_csv(file, usecols=["prompt"], dtype=str, keep_default_na=False)["prompt"].tolist()
        else:
            texts = pandas.read_parquet(file, columns=["prompt"])["prompt"].tolist()
    except ValueError as error:
        said = str(error).splitlines()[0]
        raise ValueError(f'{file} must be a {file.suffix} file with the column "prompt": {said}') from None
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"Row {row} of {file} must have a text as its prompt, got {text!r}.")
    if not texts:
        raise ValueError(f"{file} holds no prompts.")
    return [Prompt(text) for text in texts]


def is_whole(file: Path) -> bool:
    """Whether an image is there, and not damaged."""
    try:
        read_png_metadata(file)
    except ValueError:
        return False
    return True


def generate(batches: Sequence[Batch], folder: Path, painter: dict[str, Any], workers: int, cpus: int, gpus: float) -> int:
    """Makes the batches of which an image is missing, and writes those images; returns their number."""
    missing = {r.file for batch in batches for r in batch if not is_whole(folder / r.file)}
    left = [batch for batch in batches if any(request.file in missing for request in batch)]
    if not left:
        return 0
    with Progress(total=len(missing), desc="generate", unit="image") as progress:
        for row in rows_of(left, painter, workers, cpus, gpus).iter_rows():
            if row["file"] in missing:
                with replacing(folder / row["file"]) as file:
                    file.write(row["png"])
                progress.update()
    return len(missing)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("output", type=Path, help="folder for the images")
    parser.add_argument("--prompts", type=Path, required=True, help="text, JSON, CSV or Parquet file")
    parser.add_argument("--num-prompts", type=int, help="the first ones (default: all)")
    parser.add_argument("--num-images", type=int, default=1, help="images per prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--model", default="demo", help="Hub id, or a folder that every machine has")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--sampler", default="default", help='as `compare` takes it: "maskgit:guidance_scale=3"')
    parser.add_argument("--steps", type=int, help="(default: the model's)")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once, a part of the run's identity")
    parser.add_argument("--lookahead-batch-size", type=int, help="states at once, if memory runs out")
    parser.add_argument("--address", help="the cluster; by default that of RAY_ADDRESS, else one begun on this machine")
    parser.add_argument("--workers", type=int, help="(default: as many as the cluster has GPUs or CPUs for)")
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="and threads, which images may depend on")
    parser.add_argument("--gpus-per-worker", type=float, help="0.5 is two workers a GPU (default: 1 if there are GPUs)")
    args = parser.parse_args()
    try:
        for name in ("num_prompts", "num_images", "steps", "batch_size", "lookahead_batch_size", "workers", "cpus_per_worker"):
            check_integer(name, getattr(args, name), 1, optional=parser.get_default(name) is None)
        check_integer("seed", args.seed, 0)
        check_number("gpus_per_worker", args.gpus_per_worker, 0, optional=True)
        InfoGainScheduler(mask_token_id=0, **parse_sampler(args.sampler).scheduler)
        args.prompts = prompts_of(args.prompts)[: args.num_prompts]
        args.requests = requests(args.prompts, args.num_images, args.seed)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it describes its plan
    ray.init(address=args.address or os.environ.get("RAY_ADDRESS", "local"))
    resources = ray.cluster_resources()
    gpus = min(1, resources.get("GPU", 0)) if args.gpus_per_worker is None else args.gpus_per_worker
    room = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 0) / args.cpus_per_worker
    workers = args.workers or max(1, int(room))
    call = {"num_inference_steps": args.steps, "lookahead_batch_size": args.lookahead_batch_size}
    painter = {
        "model": args.model,
        "dtype": args.dtype,
        "sampler": args.sampler,
        "device": "cuda" if gpus else "cpu",
        "call": call,
    }
    own = {name: getattr(args, name) for name in ("num_images", "seed", "batch_size", "cpus_per_worker")}
    own["prompts"] = [prompt.text for prompt in args.prompts]
    batches = batches_of(args.requests, args.batch_size)
    start = time.perf_counter()
    with owned(args.output):
        check_settings(args.output, {**painter, **own}, begun=(args.output / "images").exists())
        (args.output / "images").mkdir(exist_ok=True)
        made = generate(batches, args.output / "images", painter, workers, args.cpus_per_worker, gpus)
        finish(args.requests, args.output)
    seconds = time.perf_counter() - start
    print(f"{made} of {len(args.requests)} images in {seconds:.1f} s by {workers} workers, in {args.output / 'images'}.")


if __name__ == "__main__":
    main()
