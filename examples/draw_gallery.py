#!/usr/bin/env python
"""Draws the pictures of docs/gallery.md anew, with the bundled models.

    python examples/draw_gallery.py docs

Takes a few minutes on one CPU core. `--emoji FOLDER` also draws the emoji, with the world and the model that the scripts in
examples/emoji have made in this folder.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler, load
from diffusers_infogain.demo import checker, shapes
from diffusers_infogain.evaluation.plots import load_pyplot
from diffusers_infogain.evaluation.samplers import describe_sampler, parse_sampler
from diffusers_infogain.visualization import GridCell, GridRow, labelled_grid

EXAMPLES = Path(__file__).parent
PROMPT = "a red circle and a blue diamond"
ORDERS = (("confidence", 8), ("maskgit", 8), ("halton", 8), ("uniform", 8), ("fast", 64), ("best", 64))
"""Samplers and their steps; those with an entropy bound take fewer."""


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def choose(pipe: Any, sampler: str) -> None:
    """Gives the pipeline the sampler, with the model's own settings where it says none."""
    config = pipe.scheduler.config
    pipe.scheduler = InfoGainScheduler.from_config(config, **parse_sampler(sampler).for_pipeline(config).scheduler)


def save_small(picture: PIL.Image.Image, path: Path) -> None:
    """Writes a PNG of at most 256 colors."""
    dithered = picture.convert("RGB").quantize(256, method=PIL.Image.Quantize.MEDIANCUT, dither=PIL.Image.Dither.FLOYDSTEINBERG)
    dithered.save(path, optimize=True)


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a figure of matplotlib's as `save_small` does."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi)
    load_pyplot().close(figure)
    save_small(PIL.Image.open(file), path)


def run(script: str, *arguments: object) -> None:
    """Runs a script, or a module after -m, in a process of its own."""
    words = script.split() if script.startswith("-m") else [str(EXAMPLES / script)]
    subprocess.run([sys.executable, *words, *map(str, arguments)], check=True)


def draw_demo(path: Path, num_prompts: int) -> None:
    """The picture of `diffusers-infogain demo`."""
    with tempfile.TemporaryDirectory() as folder:
        run("-m diffusers_infogain.cli demo", "--device", "cpu", "--num-prompts", num_prompts, "--output", folder)
        save_small(PIL.Image.open(Path(folder) / "demo.png"), path)


def draw_orders(path: Path, seed: int = 4) -> None:
    """The step in which each token was decoded, under several samplers, above the images that came out."""
    figure, axes = load_pyplot().subplots(2, len(ORDERS), figsize=(12, 4.6), layout="constrained")
    for column, (sampler, steps) in enumerate(ORDERS):
        pipe = InfoGainPipeline.from_pretrained("demo")
        choose(pipe, sampler)
        output = pipe(PROMPT, num_inference_steps=steps, generator=seeded(seed))
        order = output.trace.decoded_at[0].reshape(8, 8)
        shares = (order + 0.5) / (order.max() + 1)
        shown = axes[0, column].imshow(shares, cmap="viridis", vmin=0, vmax=1)
        axes[1, column].imshow(output.images[0], interpolation="lanczos")
        count = f"{int(order.max()) + 1} steps, {int(output.trace.num_evaluations.sum())} NFE"
        axes[0, column].set_title(f"{describe_sampler(sampler)}\n{count}", fontsize=10)
        holds = checker.check_image(output.images[0], shapes.parse_caption(PROMPT)).holds
        axes[1, column].set_xlabel("right" if holds else "wrong", fontsize=10)
    for cell in axes.flat:
        cell.set_xticks([])
        cell.set_yticks([])
    figure.colorbar(shown, ax=axes[0, :], ticks=[0, 1], shrink=0.9).ax.set_yticklabels(["first", "last"])
    figure.suptitle(f"When each token was decoded: “{PROMPT}”", x=0.01, ha="left", fontsize=11)
    save_figure(figure, path, 110)


def draw_trace(path: Path, film: Path, seed: int = 4) -> None:
    """`trace.plot` of one image, and its film."""
    pipe = InfoGainPipeline.from_pretrained("demo")
    choose(pipe, "best")
    output = pipe(PROMPT, num_inference_steps=64, generator=seeded(seed))
    save_figure(output.trace.plot(), path, 90)
    output.trace.film(film, size=256, seconds_per_step=0.6)


def draw_text(path: Path) -> None:
    """`trace.plot` of a Sudoku grid that the text model fills in."""
    pipe = load("demo-text")
    grid = [pipe.tokenizer("S1____2____3____4").input_ids]
    output = pipe(input_ids=grid, max_new_tokens=0, generator=seeded(0))
    save_figure(output.trace.plot(), path, 90)


def draw_editing(path: Path) -> None:
    """Parts of a picture decoded anew by the preset "best", for four seeds each."""
    pipe = InfoGainPipeline.from_pretrained("demo")
    choose(pipe, "best")
    before = pipe(PROMPT, num_inference_steps=64, generator=seeded(4)).images[0]
    diamond, left = (0, 24, 32, 64), (0, 0, 32, 64)
    right = {"image": before.crop((32, 0, 64, 64)), "outpaint": {"left": 32}, "height": 64, "width": 64}
    edits: list[tuple[str, str, tuple[int, int, int, int] | None, dict[str, Any]]] = [
        ("inpainting", "a red circle and a green triangle", diamond, {"image": before, "mask_image": box(before, diamond)}),
        ("outpainting", "a red circle and a blue square", left, right),
        ("image to image", "a red square and a blue diamond", None, {"image": before, "strength": 0.8}),
    ]
    rows = []
    for title, prompt, hidden, call in edits:
        output = pipe([prompt] * 4, num_inference_steps=64, generator=seeded(0, 1, 2, 3), **call)
        given = before.copy()
        if hidden:
            given.paste((150, 150, 150), hidden)
        cells = [GridCell(given)]
        for image in output.images:
            verdict = checker.check_image(image, shapes.parse_caption(prompt))
            cells.append(GridCell(image, verdict.reason or "right", verdict.holds))
        rows.append(GridRow(title, [prompt], cells))
    columns = ["given", *(f"seed {seed}" for seed in range(4))]
    save_small(labelled_grid(columns, rows, "A picture edited by decoding some of its tokens anew", cell_size=128), path)


def box(image: PIL.Image.Image, hidden: tuple[int, int, int, int]) -> PIL.Image.Image:
    """A mask that is white in the box."""
    mask = PIL.Image.new("L", image.size, 0)
    mask.paste(255, hidden)
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("docs", type=Path, help="folder of the documentation; pictures are written to images and results in it")
    parser.add_argument("--num-prompts", type=int, default=120, help="behind each accuracy in demo.png")
    parser.add_argument("--emoji", type=Path, help="folder of the emoji world and its model")
    args = parser.parse_args()
    folder = args.docs / "images"
    folder.mkdir(exist_ok=True)
    draw_demo(folder / "demo.png", args.num_prompts)
    draw_orders(folder / "orders.png")
    draw_trace(folder / "trace.png", folder / "decoding.webp")
    draw_editing(folder / "editing.png")
    draw_text(folder / "text_trace.png")
    run("draw_results.py", args.docs / "results")
    if args.emoji is not None:
        run("emoji/draw.py", "--world", args.emoji, "--output", folder / "emoji.png")


if __name__ == "__main__":
    main()
