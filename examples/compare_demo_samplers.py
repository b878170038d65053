#!/usr/bin/env python
"""How many images of the demo model satisfy their caption, per sampler, number of steps and seed.

    python examples/compare_demo_samplers.py --output outputs/comparison

Every finished run is a line of results.jsonl; started again, only the missing ones are made. The table is written to table.md.
With the defaults the comparison takes some hours on two CPU cores; `--num-prompts 60 --seeds 0` gives a first idea.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.cli import DEMO_GUIDANCE_SCALE, generate_images, writable_folder
from diffusers_infogain.demo import checker, shapes

SAMPLERS: dict[str, dict[str, Any]] = {
    "uniform": {"sampler": "uniform"},
    "halton": {"sampler": "halton", "masking_schedule": "arccos"},
    "confidence": {"sampler": "confidence"},
    "maskgit": {"sampler": "maskgit"},
    "entropy": {"sampler": "entropy"},
    "margin": {"sampler": "margin"},
    "lookum": {"sampler": "lookum", "certainty": "maskgit"},
    "info_gain mean": {"sampler": "info_gain", "gain_reduction": "mean", "certainty": "maskgit"},
    "info_gain mean, confidence": {"sampler": "info_gain", "gain_reduction": "mean", "certainty": "confidence"},
    "info_gain sum": {"sampler": "info_gain", "gain_reduction": "sum", "certainty": "maskgit"},
}


def run(pipe: InfoGainPipeline, base: Any, args: argparse.Namespace, name: str, steps: int, seed: int) -> dict[str, Any]:
    # The prompts are the same for all runs; a seed stands for other noise.
    captions = shapes.sample_captions(args.num_prompts, torch.Generator().manual_seed(1234), held_out=True)
    pipe.scheduler = InfoGainScheduler.from_config(base, **SAMPLERS[name])
    result = generate_images(
        pipe,
        [caption.text for caption in captions],
        [100_000 * seed + i for i in range(len(captions))],
        args.batch_size,
        f"{name}, {steps} steps, seed {seed}",
        num_inference_steps=steps,
        guidance_scale=args.guidance_scale,
        lookahead_batch_size=args.lookahead_batch_size,
    )
    right = [checker.check_image(image, caption).holds for image, caption in zip(result.images, captions, strict=True)]
    groups = defaultdict(list)
    for caption, holds in zip(captions, right, strict=True):
        groups[caption.category].append(holds)
    return {
        "sampler": name,
        "steps": steps,
        "seed": seed,
        "images": len(right),
        "right": sum(right),
        "by_category": {category: [sum(group), len(group)] for category, group in groups.items()},
        "model_rows": result.model_rows.double().mean().item(),
        "cumulative_entropy": result.cumulative_entropy.double().mean().item(),
        "seconds_per_image": result.seconds / len(right),
    }


def table(results: list[dict[str, Any]]) -> str:
    groups = defaultdict(list)
    for result in results:
        groups[result["steps"], result["sampler"]].append(result)
    seeds = sorted({result["seed"] for result in results})
    lines = [
        "| steps | sampler | right (%) | per seed (%) | model rows | cumulative entropy (nats) | s per image |",
        "|---" * 7 + "|",
    ]
    for (steps, name), group in sorted(groups.items(), key=lambda item: (item[0][0], list(SAMPLERS).index(item[0][1]))):
        total, right = sum(r["images"] for r in group), sum(r["right"] for r in group)
        share = right / total
        error = (share * (1 - share) / total) ** 0.5
        each = ", ".join(f"{100 * r['right'] / r['images']:.1f}" for r in sorted(group, key=lambda r: r["seed"]))
        mean = {key: sum(r[key] for r in group) / len(group) for key in ("model_rows", "cumulative_entropy", "seconds_per_image")}
        lines.append(
            f"| {steps} | {name} | {100 * share:.1f} ± {100 * error:.1f} | {each} | {mean['model_rows']:.1f} "
            f"| {mean['cumulative_entropy']:.1f} | {mean['seconds_per_image']:.2f} |"
        )
    note = f"{results[0]['images']} held-out prompts, seeds {', '.join(map(str, seeds))}; ± one binomial standard error."
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"))
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS), metavar="NAME")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num-prompts", type=int, default=500)
    parser.add_argument("--guidance-scale", type=float, default=DEMO_GUIDANCE_SCALE)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lookahead-batch-size", type=int, default=16, help="changes the speed only; 16 is good on a CPU")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    path = writable_folder(args.output) / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["sampler"], r["steps"], r["seed"]) for r in results}
    pipe = InfoGainPipeline.from_pretrained(args.model).to(args.device)
    base = pipe.scheduler.config
    for seed in args.seeds:
        for steps in args.steps:
            for name in args.samplers:
                if (name, steps, seed) not in done:
                    results.append(run(pipe, base, args, name, steps, seed))
                    with path.open("a") as file:
                        file.write(json.dumps(results[-1]) + "\n")
    text = table(results)
    (args.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
