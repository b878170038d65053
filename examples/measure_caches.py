#!/usr/bin/env python
"""Measures what approximate caches save, and what they cost.

    OMP_NUM_THREADS=1 python examples/measure_caches.py demo --num-captions 100
    OMP_NUM_THREADS=1 python examples/measure_caches.py shape

"demo" makes the same images of the demo model's captions for reporting with every cache in turn, and prints, for three seeds, how
many are right, how many tokens are those without a cache, and the seconds per image. "shape" times rows, and a whole image, of an
untrained transformer of the size of aMUSEd-256, whose images mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from diffusers import UVit2DModel, VQModel

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.demo.checker import check_image
from diffusers_infogain.demo.shapes import sample_captions
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.evaluation.statistics import clustered_mean
from diffusers_infogain.models.partial_rows import PartialRows, run_uvit

SAMPLERS = {"maskgit:entropy_bound=0": 16, "best": 64, "default": 64, "fast": 64}
"""With their steps, of which an entropy bound leaves some out."""
CACHES = (None, "context:0.1", "context:0.25", "ml_cache")
BATCH_SIZE = 8


def sampled(pipe: Any, base: Any, text: str) -> bool:
    """Sets a sampler; whether it looks ahead."""
    spec = parse_sampler(text).for_pipeline(base.config)
    pipe.scheduler = InfoGainScheduler.from_config(base.config, **spec.scheduler)
    return pipe.scheduler.looks_ahead


def measure_demo(num_captions: int) -> None:
    """The table of the demo model."""
    pipe = InfoGainPipeline.from_pretrained("demo")
    pipe.set_progress_bar_config(disable=True)
    base = pipe.scheduler
    captions = sample_captions(num_captions, torch.Generator().manual_seed(0), held_out=True, split="report")
    print("| sampler | cache | right, % | tokens as without, % | NFE | s / image | s, of those without |")
    print("|---|---|---|---|---|---|---|")
    for sampler, steps in SAMPLERS.items():
        looks_ahead = sampled(pipe, base, sampler)
        caches = [cache for cache in CACHES if not (looks_ahead and cache == "ml_cache")]
        found: dict[Any, Any] = {cache: defaultdict(list) for cache in caches}
        for seed, start in itertools.product(range(3), range(0, num_captions, BATCH_SIZE)):
            part = captions[start : start + BATCH_SIZE]
            exact = None
            for cache in caches:
                seeds = range(1000 * seed + start, 1000 * seed + start + len(part))
                generators = [torch.Generator().manual_seed(own) for own in seeds]
                began = time.perf_counter()
                output = pipe(
                    [str(caption) for caption in part],
                    num_inference_steps=steps,
                    generator=generators,
                    output_type="latent",
                    approximate_cache=cache,
                )
                seconds = time.perf_counter() - began
                exact = output.images if exact is None else exact
                images = pipe.state_images(output.images)
                own = found[cache]
                own["right"] += [float(check_image(*pair).holds) for pair in zip(images, part, strict=True)]
                own["caption"] += range(start, start + len(part))
                own["same"].append((output.images == exact).double().mean().item())
                own["rows"] += output.trace.num_evaluations.sum(0).tolist()
                own["seconds"].append(seconds / len(part))
                own["ratio"].append(own["seconds"][-1] / found[None]["seconds"][-1])
        for cache, own in found.items():
            right = clustered_mean(own["right"], own["caption"])
            print(
                f"| {sampler} | {cache or 'none'} | {100 * right.value:.1f} ± {100 * right.standard_error:.1f} | "
                f"{100 * statistics.fmean(own['same']):.1f} | {statistics.fmean(own['rows']):.1f} | "
                f"{statistics.median(own['seconds']):.3f} | {statistics.median(own['ratio']):.2f} |",
                flush=True,
            )
    print(f"\nn = {3 * num_captions} images per row, seeds 0 to 2, batches of {BATCH_SIZE}.")


def measure_shape(repeats: int) -> None:
    """Rows and an image at the size of aMUSEd-256."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = UVit2DModel(sample_size=16).eval()
        vqvae = VQModel(block_out_channels=(8,) * 5, down_block_types=("DownEncoderBlock2D",) * 5, norm_num_groups=8,
                        up_block_types=("UpDecoderBlock2D",) * 5, latent_channels=4, num_vq_embeddings=8192)  # fmt: skip
    pipe = InfoGainPipeline(vqvae, None, None, transformer, InfoGainScheduler(mask_token_id=8255, sampler="maskgit"))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    texts, pooled = torch.randn(1, 77, 768, generator=generator), torch.randn(1, 768, generator=generator)
    sizes = torch.tensor([[256, 256, 0, 0, 6.0]])
    tokens = torch.randint(8192, (1, 16, 16), generator=generator)
    slot, none = torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    features: dict[int, tuple[torch.Tensor, ...]] = {}

    def timed(function: Any) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    def full() -> None:
        where = torch.ones(1, 256, dtype=torch.bool)
        run_uvit(transformer, tokens, texts, pooled, sizes, where, PartialRows(features, 1, slot, (slot, slot), None))

    def partial(share: float) -> None:
        where = torch.arange(256)[None] < share * 256
        run_uvit(transformer, tokens, texts, pooled, sizes, where, PartialRows(features, 1, slot, (none, none), where))

    print("| row | s | of an exact row |\n|---|---|---|")
    with torch.no_grad():
        full()
        functions = {"exact": lambda: transformer(tokens, texts, pooled, sizes), "full, kept": full}
        functions |= {
            f"{share:.1%} of the positions": (lambda share=share: partial(share)) for share in (0.75, 0.5, 0.25, 1 / 16)
        }
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(repeats):
            for name, function in functions.items():
                times[name].append(timed(function))
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["exact"], strict=True)]
        print(f"| {name} | {statistics.median(own):.2f} | {statistics.median(ratios):.2f} |", flush=True)
    print("\n| image in 16 steps | cache | s | NFE |\n|---|---|---|---|")
    for cache in CACHES:
        began = time.perf_counter()
        output = pipe(
            prompt_embeds=pooled,
            encoder_hidden_states=texts,
            num_inference_steps=16,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            approximate_cache=cache,
        )
        rows = output.trace.num_evaluations.sum().item()
        print(f"| maskgit | {cache or 'none'} | {time.perf_counter() - began:.1f} | {rows} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the demo model: quality and seconds")
    demo.add_argument("--num-captions", type=int, default=100)
    shape = commands.add_parser("shape", help="rows of aMUSEd-256's size, with random weights: seconds")
    shape.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if args.command == "demo":
        measure_demo(args.num_captions)
    else:
        measure_shape(args.repeats)


if __name__ == "__main__":
    main()
