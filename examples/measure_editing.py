#!/usr/bin/env python
"""Measures samplers at inpainting in the demo world: a part of a drawing is hidden, and has to come out as the caption says.

    python examples/measure_editing.py --split final --seeds 0 1 2 --output outputs/editing

Two tasks: "an object" hides the 24 x 24 pixels around one object, "a half" hides that half of the picture which cuts the fewest
objects. What is not hidden stays, so the image is right if the hidden part is, and fits. `--output` gets `results.jsonl`, a line
per run with the verdict on each image, `table.md` and `inpainting.png`; runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.choices import SPLITS
from diffusers_infogain.demo import checker, shapes
from diffusers_infogain.evaluation import runs
from diffusers_infogain.evaluation.identity import pipeline_digest, scheduler_record
from diffusers_infogain.evaluation.samplers import describe_sampler, parse_sampler
from diffusers_infogain.evaluation.statistics import clustered_mean
from diffusers_infogain.evaluation.tables import markdown_table
from diffusers_infogain.files import append_json_lines, cut_unfinished, read_json_lines, save_text
from diffusers_infogain.visualization import GridCell, GridRow, labelled_grid

SAMPLERS = (
    "fast",
    "default",
    "default:lazy_threshold=3",
    "best",
    "maskgit:entropy_bound=0.25",
    "maskgit@4",
    "maskgit@8",
    "halton@4",
    "halton@8",
    "confidence@4",
    "confidence@8",
    "uniform@8",
    "paper@8",
)
"""Samplers, with a number of steps after an @; those with an entropy bound may have many steps, of which they take few."""
MOST_STEPS = 64
TASKS = ("an object", "a half")
PICTURED = ("confidence@8", "maskgit@8", "fast", "best")
TOKENIZER = "the original tokens"
"""What would come out if every hidden token were the right one: the image tokenizer is not exact."""


@dataclass
class Problem:
    """A drawing (3, 64, 64) in [0, 1], the caption it shows, and what of it is hidden, (64, 64) bool."""

    caption: shapes.Caption
    image: torch.Tensor
    hidden: torch.Tensor


def make_problems(task: str, split: str, count: int, seed: int = 1234) -> list[Problem]:
    """Drawings of held-out captions; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    captions = shapes.sample_captions(count, generator, held_out=True, split=split)
    scenes = shapes.sample_scenes(captions, generator)
    hide = hide_object if task == "an object" else hide_half
    hidden = [hide(scenes, index) for index in range(count)]
    return [Problem(*parts) for parts in zip(captions, shapes.render(scenes), hidden, strict=True)]


def hide_object(scenes: shapes.Scenes, index: int) -> torch.Tensor:
    """The 24 x 24 pixels around the first object of a scene."""
    mask = torch.zeros(shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, dtype=torch.bool)
    x, y = int(scenes.x[index, 0]), int(scenes.y[index, 0])
    mask[max(y - 12, 0) : y + 12, max(x - 12, 0) : x + 12] = True
    return mask


def hide_half(scenes: shapes.Scenes, index: int) -> torch.Tensor:
    """The half that holds an object and cuts the fewest; the first of left, right, top and bottom among equals."""
    middle, present = shapes.IMAGE_SIZE // 2, scenes.shape[index] >= 0
    halves = []
    for axis, values in ((1, scenes.x[index, present]), (0, scenes.y[index, present])):
        for after in (False, True):
            inside = (values >= middle) if after else (values < middle)
            cut = ((values - middle).abs() < 10).sum()
            mask = torch.zeros(shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, dtype=torch.bool)
            mask.narrow(axis, middle if after else 0, middle).fill_(True)
            halves.append((not inside.any(), int(cut), mask))
    return min(halves, key=lambda half: half[:2])[2]


def inpaint(pipe: InfoGainPipeline, sampler: str, problems: Sequence[Problem], seed: int, batch_size: int) -> dict[str, Any]:
    """Fills in the hidden parts by a sampler; returns the images and what they took."""
    name, _, steps = sampler.partition("@")
    config = pipe.scheduler.config
    pipe.scheduler = InfoGainScheduler.from_config(config, **parse_sampler(name).for_pipeline(config).scheduler)
    record = scheduler_record(pipe.scheduler)
    images: list[PIL.Image.Image] = []
    evaluations: list[int] = []
    passes: list[int] = []
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        output = pipe(
            [problem.caption.text for problem in batch],
            image=[problem.image for problem in batch],
            mask_image=[problem.hidden for problem in batch],
            num_inference_steps=int(steps or MOST_STEPS),
            generator=[torch.Generator().manual_seed(1000 * seed + first + i) for i in range(len(batch))],
            lookahead_batch_size=16,
        )
        images += output.images
        evaluations += output.trace.num_evaluations.sum(0).tolist()
        passes += output.trace.sequential_passes.tolist()
    pipe.scheduler = InfoGainScheduler.from_config(config)
    return {"images": images, "num_evaluations": evaluations, "num_passes": passes, "scheduler": record}


def as_decoded(pipe: InfoGainPipeline, problems: Sequence[Problem]) -> list[torch.Tensor]:
    """The drawings with their hidden parts as the image tokenizer gives them back."""
    tokens = pipe.encode_image([problem.image for problem in problems])
    with torch.no_grad():
        decoded = pipe.to_pixels(tokens)
    hidden = torch.stack([problem.hidden for problem in problems])[:, None]
    return list(torch.where(hidden, decoded, torch.stack([problem.image for problem in problems])))


def verdicts(images: Sequence[Any], problems: Sequence[Problem]) -> str:
    """A 1 for every image that shows its caption, else a 0."""
    found = (checker.check_image(image, problem.caption) for image, problem in zip(images, problems, strict=True))
    return "".join("1" if verdict.holds else "0" for verdict in found)


HEADING = """# Inpainting on the demo model, all configurations

Made by `examples/measure_editing.py`; [editing.md](../editing.md#which-sampler) explains it. Demo model, held-out captions of the
split {split!r}, {count} drawings and {seeds} seeds for each task, guidance 1.2, CPU, float32; standard errors over drawings.

"""


def table(records: Sequence[dict[str, Any]], count: int) -> str:
    """Share of right images of every sampler, in the order of the rows that it took."""
    lines = []
    for task in TASKS:
        rows = []
        for sampler in dict.fromkeys(record["sampler"] for record in records if record["task"] == task):
            own = [record for record in records if (record["task"], record["sampler"]) == (task, sampler)]
            right = [float(verdict) for record in own for verdict in record["right"]]
            problems = [index for record in own for index in range(count)]
            accuracy = clustered_mean(right, problems)
            name, _, steps = sampler.partition("@")
            title = TOKENIZER if sampler == TOKENIZER else describe_sampler(name)
            cost = [sum(sum(record[key]) for record in own) / len(right) for key in ("num_evaluations", "num_passes")]
            most = "" if sampler == TOKENIZER else steps or str(MOST_STEPS)
            rows.append((cost[0], [title, most, f"{100 * accuracy.value:.1f} ± {100 * accuracy.standard_error:.1f}", *cost]))
        cells = [[*row[:3], *(f"{value:.1f}" for value in row[3:])] for _, row in sorted(rows, key=lambda row: row[0])]
        head = ["sampler", "steps", "right (%)", "NFE", "sequential passes"]
        lines += [f"**{task.capitalize()} is hidden**", "", markdown_table(head, cells).rstrip("\n"), ""]
    return "\n".join(lines)


def draw(pipe: InfoGainPipeline, split: str, count: int, batch_size: int) -> PIL.Image.Image:
    """The first problems of both tasks, with what some samplers make of them."""
    problems = [problem for task in TASKS for problem in make_problems(task, split, count)[3:6]]

    def picture(image: torch.Tensor) -> PIL.Image.Image:
        return PIL.Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())

    hidden = [torch.where(problem.hidden, 0.62, problem.image) for problem in problems]
    rows = [GridRow("What is known", ["the grey part is", "to be filled in"], [GridCell(picture(image)) for image in hidden])]
    for sampler in PICTURED:
        result = inpaint(pipe, sampler, problems, 0, batch_size)
        found = [checker.check_image(image, problem.caption) for image, problem in zip(result["images"], problems, strict=True)]
        cells = [
            GridCell(image, verdict.reason or "right", verdict.holds)
            for image, verdict in zip(result["images"], found, strict=True)
        ]
        name, _, steps = sampler.partition("@")
        lines = [f"{sum(result['num_evaluations']) / len(problems):.0f} NFE"]
        rows.append(GridRow(describe_sampler(name), [f"{steps} steps", *lines] if steps else lines, cells))
    return labelled_grid(
        [problem.caption.text for problem in problems], rows, "Inpainting: known tokens stay, the rest is decoded"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--split", default="choose", choices=SPLITS)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--num-prompts", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("outputs/editing"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pipe = InfoGainPipeline.from_pretrained("demo")
    pipe.set_progress_bar_config(disable=True)
    runs.check_settings(args.output, {"split": args.split, "num_prompts": args.num_prompts, "weights": pipeline_digest(pipe)})
    file = args.output / "results.jsonl"
    cut_unfinished(file, '{"task": ')
    records = read_json_lines(file) if file.exists() else []
    problems = {task: make_problems(task, args.split, args.num_prompts) for task in TASKS}
    for seed, task, sampler in itertools.product(args.seeds, TASKS, [TOKENIZER, *args.samplers]):
        key = {"task": task, "sampler": sampler, "seed": seed}
        if any(key.items() <= record.items() for record in records):
            continue
        if sampler == TOKENIZER:
            nothing = [0] * len(problems[task])
            result = {"images": as_decoded(pipe, problems[task]), "num_evaluations": nothing, "num_passes": nothing}
        else:
            result = inpaint(pipe, sampler, problems[task], seed, args.batch_size)
        record = {**key, "right": verdicts(result.pop("images"), problems[task]), **result}
        append_json_lines([record], file)
        records.append(record)
        print(f"{task}, {sampler}, seed {seed}: {record['right'].count('1')} of {len(record['right'])} right", flush=True)
    heading = HEADING.format(split=args.split, count=args.num_prompts, seeds=len(args.seeds))
    save_text(heading + table(records, args.num_prompts), args.output / "table.md")
    draw(pipe, args.split, args.num_prompts, args.batch_size).save(args.output / "inpainting.png")
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    main()
