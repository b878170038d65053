#!/usr/bin/env python
"""Draws pictures of held-out captions beside what the model makes of them.

    python examples/emoji/draw.py --world runs/emoji --output emoji.png

In threes, from above: the real picture, which was in no training; the model's image tokenizer's rendering of it; a sample.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from train_tokenizer import decode, encode_pictures
from world import IMAGE_SIZE, load_world

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.choices import SPLITS
from diffusers_infogain.evaluation.runs import generate_images
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.image_files import save_png


def sheet(rows: list[np.ndarray], columns: int, scale: int) -> np.ndarray:
    """Rows of pictures (N, 64, 64, 3) below each other, N pictures in lines of `columns`, with a gap after each line of them."""
    lines = []
    for first in range(0, len(rows[0]), columns):
        for row in rows:
            line = np.full((IMAGE_SIZE, columns * IMAGE_SIZE, 3), 255, np.uint8)
            for i, picture in enumerate(row[first : first + columns]):
                line[:, i * IMAGE_SIZE : (i + 1) * IMAGE_SIZE] = picture
            lines.append(line)
        lines.append(np.full((8, columns * IMAGE_SIZE, 3), 255, np.uint8))
    return np.concatenate(lines[:-1]).repeat(scale, 0).repeat(scale, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--world", type=Path, default=Path("runs/emoji"), help="folder of the world and the model")
    parser.add_argument("--model", type=Path, help="folder of the model; default: `model` in that of the world")
    parser.add_argument("--output", type=Path, default=Path("emoji.png"))
    splits = (*SPLITS, *(f"{split} unseen" for split in SPLITS), "train")
    parser.add_argument("--split", default="choose", choices=splits, help="of which captions")
    parser.add_argument("--captions", type=int, default=36, help="so many, spread over the split")
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--scale", type=int, default=1, help="screen pixels per pixel")
    parser.add_argument("--sampler", default="maskgit", help="NAME or NAME:setting=value,setting=value")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pixels, pictures = load_world(args.world)
    held = [i for i, picture in enumerate(pictures) if picture.split == args.split]
    chosen = [held[int(k)] for k in np.linspace(0, len(held) - 1, min(args.captions, len(held)))]
    pipe = InfoGainPipeline.from_pretrained(args.model or args.world / "model")
    own = dict(pipe.scheduler.config)
    sampler = parse_sampler(args.sampler).for_pipeline(own)
    pipe.scheduler = InfoGainScheduler.from_config(own, **sampler.scheduler)
    captions = [pictures[i].caption for i in chosen]
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, **sampler.call}
    seeds = [1_000_000 * args.seed + i for i in range(len(chosen))]
    images = generate_images(pipe, captions, seeds, 32, args.sampler, **call).images
    book = torch.load(args.world / "codebook.pt", weights_only=True)
    with torch.no_grad():
        decoded = decode(pipe.vqvae, encode_pictures(pixels[chosen], book)).clamp(0, 1)
    rendered = (255 * decoded).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [pixels[chosen], rendered, np.stack([np.asarray(image) for image in images])]
    save_png(PIL.Image.fromarray(sheet(rows, args.columns, args.scale)), args.output, {"captions": captions})
    print(f"Wrote {args.output}: " + "; ".join(captions))


if __name__ == "__main__":
    main()
