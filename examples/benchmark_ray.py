#!/usr/bin/env python
"""Measures what Ray adds to making images: examples/ray_generate.py against as many processes that loop over the same batches.

    pip install -c constraints.txt "ray[data]"
    python examples/benchmark_ray.py --num-images 1000 --workers 2

Both make images of the demo model, one thread to a worker, and write the same files. "Making" is the time between the first and
the last file, "start" what comes before and after. The two alternate, and the ratio is that of their seconds of making.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ray_generate import Painter, row_of

from diffusers_infogain.demo.shapes import sample_captions
from diffusers_infogain.evaluation.prompts import read_prompts, requests
from diffusers_infogain.files import replacing
from diffusers_infogain.processes import batches_of

PAINTER = {"model": "demo", "dtype": "float32", "device": "cpu", "sampler": "fast"}
STEPS = 64
EXAMPLE = Path(__file__).with_name("ray_generate.py")


def loop(index: int, workers: int, batch_size: int, prompts: Path, output: Path, loaded: Any) -> None:
    """One process of those that loop: it makes every `workers`-th batch, once all have loaded the model."""
    painter = Painter(**PAINTER, call={"num_inference_steps": STEPS})
    loaded.wait()
    for batch in batches_of(requests(read_prompts(prompts)), batch_size)[index::workers]:
        for row in painter(row_of(batch)):
            with replacing(output / row["file"]) as file:
                file.write(row["png"])


def run_loop(prompts: Path, output: Path, args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    output.mkdir(parents=True)
    loaded = context.Barrier(args.workers)
    own = [(index, args.workers, args.batch_size, prompts, output, loaded) for index in range(args.workers)]
    processes = [context.Process(target=loop, args=arguments) for arguments in own]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("A process of the loop failed.")


def run_ray(prompts: Path, output: Path, args: argparse.Namespace) -> None:
    command = [sys.executable, EXAMPLE, output.parent, "--prompts", prompts, "--address", "local", "--steps", STEPS]
    command += ["--sampler", PAINTER["sampler"], "--batch-size", args.batch_size, "--workers", args.workers]
    all_at_once = {"RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "600"}  # as the processes of the loop begin
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env={**os.environ, **all_at_once})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    making: dict[str, list[float]] = {"loop": [], "ray": []}
    with tempfile.TemporaryDirectory() as temporary:
        prompts = Path(temporary, "prompts.txt")
        captions = sample_captions(args.num_images, torch.Generator().manual_seed(0))
        prompts.write_text("".join(f"{caption.text}\n" for caption in captions))
        for number in range(args.repeats):
            found = {}
            for name, run in (("loop", run_loop), ("ray", run_ray)):
                output = Path(temporary, f"{name}-{number}", "images")
                start = time.perf_counter()
                run(prompts, output, args)
                whole = time.perf_counter() - start
                files = sorted(output.glob("*.png"))
                times = [file.stat().st_mtime for file in files]
                making[name].append(max(times) - min(times))
                found[name] = {file.name: file.read_bytes() for file in files}
                print(
                    f"{name}: {len(files)} images, {making[name][-1]:.2f} s making, {whole - making[name][-1]:.2f} s start",
                    flush=True,
                )
            if found["loop"] != found["ray"] or len(found["ray"]) != args.num_images:
                raise SystemExit("The images of Ray are not those of the loop.")
    ratios = [by_ray / by_loop for by_ray, by_loop in zip(making["ray"], making["loop"], strict=True)]
    print(f"ratio of ray to loop: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
