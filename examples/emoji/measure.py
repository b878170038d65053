#!/usr/bin/env python
"""Measures samplers on the emoji model: does the judge see in their pictures what the captions say, and are they like real ones?

    python examples/emoji/measure.py --world runs/emoji --split choose --samplers maskgit pivot:entropy_bound=0.25 --steps 8 12

Every sampler gets the same captions and seeds. `--output` gets `results.jsonl`, a line per run with the judge's verdict on each
image, and `table.md`; runs that are there already are not made again. With `--inpaint` the upper halves of pictures are given.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classifier import Classifier, load_classifier, verdicts
from tqdm.auto import tqdm
from train_tokenizer import decode, encode_pictures
from world import Picture, load_world

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.choices import SPLITS
from diffusers_infogain.evaluation import groups, runs
from diffusers_infogain.evaluation.features import FeatureExtractor
from diffusers_infogain.evaluation.identity import pipeline_digest, scheduler_record
from diffusers_infogain.evaluation.metrics import Diversity, FrechetDistance, PrecisionRecall
from diffusers_infogain.evaluation.samplers import SamplerSpec, parse_sampler
from diffusers_infogain.files import append_json_lines, cut_unfinished, digest, read_json_lines, save_json, save_text

KEY = ("sampler", "steps", "guidance_scale")
VERDICTS = ("all", "set", "tone", "tone_given", "name", "name_top5")
SHARES = {name.replace("_", " "): groups.per_item(f"{name}_right") for name in VERDICTS}
COLUMNS = {
    "states": groups.per_run("num_states"),
    "NFE": groups.per_run("num_evaluations"),
    "passes": groups.per_run("sequential_passes"),
    "s / image": groups.per_run("seconds_per_image"),
    **SHARES,
    **{name: groups.per_run(name) for name in ("Frechet", "precision", "recall", "variety")},
}


class JudgeFeatures(FeatureExtractor):
    """What the judge's answers are made from: 64 numbers per picture of 64 x 64 pixels."""

    def __init__(self, judge: Classifier):
        super().__init__(judge, judge.embedding, "emoji judge")

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """The features (B, 64)."""
        return torch.cat([self.network.features(part.float() / 255) for part in images.split(256)])


@dataclass(frozen=True)
class Cell(groups.Cell):
    """One run: all captions with one sampler and one seed."""

    sampler: SamplerSpec
    steps: int
    guidance_scale: float
    seed: int


@dataclass(frozen=True)
class Reference:
    """What images are compared with: the captions' own pictures, none of which was trained on."""

    judge: Classifier
    pictures: list[Picture]
    images: torch.Tensor

    def measure(self, images: torch.Tensor, copies: int) -> dict[str, Any]:
        """Verdicts on each of the images (N, 3, H, W) of bytes, `copies` per caption, and distances of all to the real ones."""
        shown = [picture for picture in self.pictures for _ in range(copies)]
        found = verdicts(self.judge, images.float() / 255, shown)
        found["tone_given"] = [right if p.tone else None for right, p in zip(found["tone"], shown, strict=True)]
        found["all"] = [
            None if name is None else set_ and tone and name
            for set_, tone, name in zip(found["set"], found["tone"], found["name"], strict=True)
        ]
        extractor = JudgeFeatures(self.judge)
        frechet, manifold = FrechetDistance(extractor), PrecisionRecall(extractor)
        for metric in (frechet, manifold):
            metric.update(self.images, real=True)
            metric.update(images, real=False)
        record = {f"{name}_right": found[name] for name in VERDICTS}
        record |= {"Frechet": frechet.compute().item(), **{k: v.item() for k, v in manifold.compute().items()}}
        if copies > 1:
            within, real = Diversity(extractor), Diversity(extractor)
            within.update(images, torch.arange(len(images)) // copies)
            real.update(self.images)
            record["variety"] = (within.compute()["distance"] / real.compute()["distance"]).item()
        return record


@torch.no_grad()
def reconstruct(pipe: InfoGainPipeline, images: torch.Tensor, book: dict[str, torch.Tensor]) -> torch.Tensor:
    """Images of bytes (N, 3, H, W), drawn from their codes as those of training pictures were found."""
    tokens = encode_pictures(images.permute(0, 2, 3, 1).numpy(), book)
    parts = [decode(pipe.vqvae, part) for part in tokens.split(64)]
    return (255 * torch.cat(parts).clamp(0, 1)).round().byte()


def limits(pipe: InfoGainPipeline, reference: Reference, book: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """The figures of the real pictures themselves, and of their reconstructions, which no sampler can be expected to beat."""
    found = {}
    decoded = reconstruct(pipe, reference.images, book)
    for name, images in (("real", reference.images), ("reconstructed", decoded)):
        record = reference.measure(images, 1) | {"num_images_per_prompt": 1, "cumulative_entropies": [0.0] * len(images)}
        figures = {key: column([record]) for key, column in SHARES.items()}
        found[name] = {key: figure.value for key, figure in figures.items() if figure}
        found[name] |= {key: record[key] for key in ("Frechet", "precision", "recall")}
    errors = (decoded.double() - reference.images.double()).square().mean((1, 2, 3)) / 255**2
    found["reconstructed"]["PSNR"] = (-10 * errors.clamp(min=1e-10).log10()).mean().item()
    return found


def inpaint(
    pipe: InfoGainPipeline, reference: Reference, copies: int, seeds: Sequence[int], batch_size: int, **call: Any
) -> runs.Generated:
    """The lower halves of the real pictures, hidden and filled in by their captions."""
    mask = torch.zeros(reference.images.shape[2:])
    mask[len(mask) // 2 :] = 1
    indices = [index for index in range(len(reference.pictures)) for _ in range(copies)]
    every, figures = [], []
    start = time.perf_counter()
    for first in range(0, len(indices), batch_size):
        part = indices[first : first + batch_size]
        images, trace = pipe(
            [reference.pictures[index].caption for index in part],
            image=reference.images[part],
            mask_image=mask,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + len(part)]],
            return_dict=False,
            **call,
        )
        every += images
        passes, entropy = trace.sequential_passes, trace.cumulative_entropy
        figures.append((trace.num_states.sum(0), trace.num_evaluations.sum(0), passes, entropy))
    states, evaluations, passes, entropies = map(torch.cat, zip(*figures, strict=True))
    return runs.Generated(every, list(seeds), states, evaluations, passes, entropies, time.perf_counter() - start)


def run(
    pipe: InfoGainPipeline, cell: Cell, reference: Reference, copies: int, batch_size: int, inpaints: bool = False
) -> tuple[dict[str, Any], np.ndarray]:
    """The record of a run, and its images."""
    prompts = [picture.caption for picture in reference.pictures for _ in range(copies)]
    seeds = [1_000_000 * cell.seed + i for i in range(len(prompts))]
    call = {"num_inference_steps": cell.steps, "guidance_scale": cell.guidance_scale, **cell.sampler.call}
    if inpaints:
        made = inpaint(pipe, reference, copies, seeds, batch_size, **call)
    else:
        made = runs.generate_images(pipe, prompts, seeds, batch_size, cell.sampler.name, **call)
    pixels = np.stack([np.asarray(image) for image in made.images])
    states = made.num_states
    record = {
        **cell.key,
        "looks_ahead": cell.sampler.looks_ahead,
        "num_images_per_prompt": copies,
        "num_states": states.double().mean().item(),
        "num_evaluations": made.num_evaluations.double().mean().item(),
        "sequential_passes": made.sequential_passes.double().mean().item(),
        "seconds_per_image": made.seconds / len(prompts),
        "cumulative_entropies": [round(value, 3) for value in made.cumulative_entropy.tolist()],
        **reference.measure(torch.from_numpy(pixels).permute(0, 3, 1, 2), copies),
    }
    return record, pixels


def table(found: Sequence[groups.Group]) -> str:
    """The figures as Markdown, with standard errors."""
    names = [name for name in COLUMNS if any(name in group.figures for group in found)]

    def cell(group: groups.Group, name: str) -> str:
        if name not in group.figures:
            return ""
        figure = group.figures[name]
        return f"{figure.value:.3g}" + (
            "" if figure.standard_error != figure.standard_error else f" ± {figure.standard_error:.2g}"
        )

    head = ["sampler", "steps", "guidance", *names]
    rows = [
        [group["sampler"], str(group["steps"]), f"{group['guidance_scale']:g}", *(cell(group, n) for n in names)]
        for group in found
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--world", type=Path, default=Path("runs/emoji"), help="folder of the world, the judge and the model")
    parser.add_argument("--model", type=Path, help="folder of the model; default: `model` in that of the world")
    parser.add_argument("--output", type=Path, help="default: `measured-SPLIT` in the folder of the world")
    splits = (*SPLITS, *(f"{split} unseen" for split in SPLITS))
    parser.add_argument(
        "--split", default="choose", choices=splits, help="of which captions; `unseen`: names held out altogether"
    )
    parser.add_argument("--samplers", nargs="+", default=["maskgit"], help="NAME or NAME:setting=value,setting=value")
    parser.add_argument("--steps", type=int, nargs="+", default=[12])
    parser.add_argument("--guidance-scales", type=float, nargs="+", help="default: the model's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images-per-caption", type=int, default=2, help="variety within a caption needs 2")
    parser.add_argument("--captions", type=int, help="so many captions, spread over the split; default: all")
    parser.add_argument("--inpaint", action="store_true", help="hide the lower halves of the real pictures, and fill them in")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    output = args.output or args.world / f"measured-{args.split.replace(' ', '-')}"
    output.mkdir(parents=True, exist_ok=True)
    pipe = InfoGainPipeline.from_pretrained(args.model or args.world / "model")
    pixels, pictures = load_world(args.world)
    judge = load_classifier(args.world / "judge.pt", pictures, "judge")
    held = [i for i, picture in enumerate(pictures) if picture.split == args.split]
    if args.captions:
        held = [held[int(k)] for k in np.linspace(0, len(held) - 1, min(args.captions, len(held)))]
    images = torch.from_numpy(pixels[held]).permute(0, 3, 1, 2)
    reference = Reference(judge, [pictures[i] for i in held], images)
    settings = {
        "model": pipeline_digest(pipe),
        "judge": digest([args.world / "judge.pt"]),
        "split": args.split,
        "prompts": [picture.caption for picture in reference.pictures],
        "images_per_caption": args.images_per_caption,
        "batch_size": args.batch_size,
        **({"inpaint": True} if args.inpaint else {}),
    }
    path, begin = output / "results.jsonl", '{"sampler": '
    runs.check_settings(output, settings, begun=path.exists())
    cut_unfinished(path, begin)
    records = read_json_lines(path, begin=begin) if path.exists() else []
    own = dict(pipe.scheduler.config)
    specs = [parse_sampler(text).for_pipeline(own) for text in args.samplers]
    scales = args.guidance_scales or [pipe.default_guidance_scale]
    cells = [
        Cell(spec, steps, scale, seed) for seed, scale, steps, spec in itertools.product(args.seeds, scales, args.steps, specs)
    ]
    for cell in tqdm(cells, desc="measure", unit="run"):
        pipe.scheduler = InfoGainScheduler.from_config(own, **cell.sampler.scheduler)
        scheduler = scheduler_record(pipe.scheduler)
        record = cell.find(records)
        if record is None:
            record, _ = run(pipe, cell, reference, args.images_per_caption, args.batch_size, args.inpaint)
            record["scheduler"] = scheduler
            append_json_lines([record], path)
            records.append(record)
        else:
            runs.refuse_differences(f"{path} ({cell.sampler.name})", {"scheduler": record["scheduler"]}, {"scheduler": scheduler})
    book = torch.load(args.world / "codebook.pt", weights_only=True)
    save_json(limits(pipe, reference, book), output / "limits.json")
    text = table(groups.summarize(records, KEY, COLUMNS))
    save_text(text, output / "table.md")
    print(text)
    print(f"Figures of {len(records)} runs are in {path}.")


if __name__ == "__main__":
    main()
