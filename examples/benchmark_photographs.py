#!/usr/bin/env python
"""Measures the memory and time that `diffusers-infogain evaluate` takes for different numbers of photographs.

    python examples/benchmark_photographs.py --counts 500 20000 --metrics frechet

The photographs are random, of mixed sizes and formats, and each is linked many times. There are as many measured images as images
of the reference. Each count runs in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((640, 480), (480, 640), (500, 375), (640, 427), (333, 500), (1024, 768))


def make_photographs(folder: Path, seed: int) -> list[Path]:
    """One JPEG, one PNG and one gray JPEG of every size, with smooth colors and some noise, so that files are of usual size."""
    generator = np.random.default_rng(seed)
    paths = []
    for i, (width, height) in enumerate(SIZES):
        smooth = Image.fromarray(generator.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((width, height))
        noise = generator.integers(-9, 10, size=(height, width, 3))
        image = Image.fromarray((np.array(smooth) + noise).clip(0, 255).astype(np.uint8))
        for name, variant in ((f"{i}.jpg", image), (f"{i}.png", image), (f"{i}_gray.jpg", image.convert("L"))):
            variant.save(folder / name)
            paths.append(folder / name)
    return paths


def link(paths: list[Path], count: int, folder: Path) -> Path:
    """A folder with this many links to the images."""
    folder.mkdir()
    for i in range(count):
        path = paths[i % len(paths)]
        (folder / f"{i:06d}{path.suffix}").symlink_to(path)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 20000])
    parser.add_argument("--metrics", nargs="+", default=["frechet"])
    parser.add_argument("--features", default="demo", help="demo needs no download")
    parser.add_argument("--resize", default="bicubic")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sets = []
        for name in ("images", "reference"):
            (folder / name).mkdir()
            sets.append(make_photographs(folder / name, seed=len(sets)))
        for count in args.counts:
            images, reference = (link(paths, count, folder / f"{paths[0].parent.name}-{count}") for paths in sets)
            command = [sys.executable, "-m", "diffusers_infogain.cli", "evaluate", "--device", "cpu"]
            command += ["--images", images, "--reference", reference, "--output", folder / f"report-{count}"]
            command += ["--features", args.features, "--resize", args.resize, "--metrics", *args.metrics]
            start = time.perf_counter()
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
            # The largest peak of all children so far, which is the latest one's since counts ascend.
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            seconds = time.perf_counter() - start
            print(f"{count} images and {count} of the reference: {peak:.0f} MiB at most, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
