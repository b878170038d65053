"""`diffusers-infogain demo`."""

from __future__ import annotations

import argparse

import torch

import diffusers_infogain

from ..evaluation.runs import generate_images
from ..evaluation.samplers import describe_sampler, parse_sampler
from ..output_folders import owned
from ..scheduling_infogain import InfoGainScheduler
from . import common
from .generate import save_once

# Samplers with an entropy bound stop as soon as everything is decoded, so their schedule may have more steps than that of the
# others.
DEMO_SAMPLERS = ("confidence", "maskgit", "fast", "default:lazy_threshold=3")
MORE_STEPS = 4
DEMO_PROMPTS = (
    "a circle",
    "a square and a triangle",
    "three blue squares",
    "a yellow diamond",
    "a green triangle left of a yellow diamond",
    "a cyan square above a purple circle",
    "a red circle and a blue diamond",
)


def demo(args: argparse.Namespace) -> None:
    """Draws the same prompts and seeds with four samplers in one picture, judged by the demo world's checker."""
    with owned(args.output):
        _demo(args)


def _demo(args: argparse.Namespace) -> None:
    from ..demo import checker, shapes
    from ..visualization import GridCell, GridRow, labelled_grid

    args.model, args.variant, args.vqvae = "demo", None, None
    pipe = common.load_pipeline(args)
    base = pipe.scheduler.config
    captions = [shapes.parse_caption(prompt) for prompt in DEMO_PROMPTS]
    sampled = shapes.sample_captions(args.num_prompts, torch.Generator().manual_seed(args.seed), held_out=True)
    prompts = [caption.text for caption in [*captions, *sampled]]
    seeds = [args.seed + i for i in range(len(prompts))]
    rows = []
    for text in DEMO_SAMPLERS:
        name = describe_sampler(text)
        pipe.scheduler = InfoGainScheduler.from_config(base, **parse_sampler(text).for_pipeline(base).scheduler)
        bounded = pipe.scheduler.entropy_bound > 0
        steps = args.steps * MORE_STEPS if bounded else args.steps
        # On a CPU a chunk that stays in the cache is a quarter faster; images do not depend on it.
        call = {"num_inference_steps": steps, "lookahead_batch_size": 16}
        result = generate_images(pipe, prompts, seeds, args.batch_size, name, **call)
        verdicts = [checker.check_image(i, c) for i, c in zip(result.images, [*captions, *sampled], strict=True)]
        right = torch.tensor([verdict.holds for verdict in verdicts[len(captions) :]]).double()
        error = (right.var() / len(right)).sqrt().item() if len(right) > 1 else float("nan")
        lines = [
            f"{'at most ' if bounded else ''}{steps} steps: {result.num_states.double().mean():.0f} states, "
            f"{result.num_evaluations.double().mean():.0f} NFE in "
            f"{result.sequential_passes.double().mean():.0f} sequential passes",
            f"{100 * right.mean():.0f} ± {100 * error:.0f} % of {len(right)} held-out prompts right",
            f"{result.cumulative_entropy[len(captions) :].mean():.1f} nats cumulative entropy",
        ]
        cells = [
            GridCell(image, verdict.reason or "right", verdict.holds)
            for image, verdict in zip(result.images[: len(captions)], verdicts[: len(captions)], strict=True)
        ]
        rows.append(GridRow(name, lines, cells))
        print(f"{name}: {', '.join(lines)}, {result.seconds / len(prompts):.2f} s per image", flush=True)
    title = "Same prompts, same seeds, same model: four ways to choose the next tokens"
    settings = {**common.identity(args, pipe), "version": diffusers_infogain.__version__}
    settings |= {name: getattr(args, name) for name in ("seed", "steps", "num_prompts", "batch_size")}
    path = save_once(labelled_grid([c.text for c in captions], rows, title), args.output / "demo.png", settings)
    print(f"Picture written to {path}.")
