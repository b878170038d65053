#!/usr/bin/env python
"""Finds the greedy settings that others have to beat, on text tasks and on exact models.

python examples/choose_text_settings.py outputs/choose-text

Every greedy rule is combined with entropy bounds, fixed numbers of tokens per step, top_p and token temperatures. All are
compared on few problems of the split "choose", and those that do best on more: layer by layer of settings that no other one
beats in quality, variety and NFE at once. Writes a table per task, in which the settings that none beats are bold. Goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from diffusers_infogain import InfoGainTextPipeline
from diffusers_infogain.evaluation import exact, text_comparison, text_tasks
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.evaluation.splits import seed_of_split
from diffusers_infogain.evaluation.statistics import Figure
from diffusers_infogain.evaluation.tables import format_figure, markdown_table
from diffusers_infogain.files import read_json_lines
from diffusers_infogain.progress import Progress
from diffusers_infogain.token_frequencies import save_token_frequencies, token_frequencies

SPLIT = "choose"
TEXT_TASKS = ("equation", "sudoku")
EXACT_TASKS = ("exact-sudoku", "exact-digits", "exact-synonyms")
RULES = ("confidence", "maskgit", "entropy", "margin", "uniform", "left", "klass", "pivot")
BOUNDS = (0.1, 0.25, 0.5, 1)
PARALLEL = {
    "confidence_parallel": [f"parallel_threshold={share}" for share in (0.5, 0.7, 0.9)],
    "klass_parallel": [f"klass_threshold=0.01,parallel_threshold={share}" for share in (0.5, 0.7, 0.9)],
    "factor_parallel": [f"parallel_factor={factor}" for factor in (0.5, 1, 2)],
    "frechet_parallel": [f"parallel_factor={factor}" for factor in (0.5, 1, 2)],
}
"""Rules that say by themselves how many tokens a step decodes."""
DRAWS = ("", "top_p=0.9", "token_temperature=0.7", "top_p=0.9,token_temperature=0.7")
"""How tokens are drawn."""

Setting = tuple[str, int]
"""A sampler as `compare-text` takes it, and the number of tokens per step."""


@dataclass(frozen=True)
class Measured:
    """What a setting reached on a task; larger is better for quality and variety."""

    setting: Setting
    quality: Figure
    variety: float
    nats: float
    num_evaluations: float

    def beats(self, other: Measured) -> bool:
        """Whether it is nowhere worse than another one and somewhere better."""
        own, its = ((m.quality.value, m.variety, -m.num_evaluations) for m in (self, other))
        return own != its and all(a >= b for a, b in zip(own, its, strict=True))


def with_draws(sampler: str) -> list[str]:
    """A sampler with each way to draw tokens."""
    return [sampler + (f"{',' if ':' in sampler else ':'}{draw}" if draw else "") for draw in DRAWS]


def all_settings(rules: Sequence[str], bounds: Iterable[float], counts: Iterable[int]) -> list[Setting]:
    """Every rule with every bound, and without a bound at every number of tokens per step."""
    settings: list[Setting] = []
    for rule in rules:
        if rule in PARALLEL:
            settings += [(name, 1) for own in PARALLEL[rule] for name in with_draws(f"{rule}:{own}")]
            continue
        settings += [(name, count) for name in with_draws(rule) for count in counts]
        for bound in bounds:
            settings += [(name, 1) for name in with_draws(f"{rule}{',' if ':' in rule else ':'}entropy_bound={bound}")]
    return settings


def layers(measured: Sequence[Measured]) -> list[list[Measured]]:
    """The settings that none beats, those that only the first ones beat, and so on, each layer by falling quality."""
    left, found = list(measured), []
    while left:
        front = [one for one in left if not any(other.beats(one) for other in left)]
        found.append(sorted(front, key=lambda one: -one.quality.value))
        left = [one for one in left if one not in front]
    return found


def measure_text(task: str, settings: Sequence[Setting], num: int, seeds: Sequence[int], folder: Path) -> list[Measured]:
    """Runs what is missing on a text task; variety is the share of answers that are right and distinct where nothing is given."""
    for count in dict.fromkeys(count for _, count in settings):
        names = [name for name, own in settings if own == count]
        arguments = ["--tasks", task, "--split", SPLIT, "--num-problems", num, "--batch-size", num, "--tokens-per-step", count]
        arguments += ["--device", "cpu", "--output", folder, "--seeds", *seeds, "--samplers", *names]
        command = [sys.executable, "-m", "diffusers_infogain.cli", "compare-text", *map(str, arguments)]
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(code)
    records = text_comparison.read_records(folder / "results.jsonl", num)
    measured = []
    for group in text_comparison.text_groups(record for record in records if record["seed"] in seeds):
        if (setting := (group["sampler"], group["tokens_per_step"])) in settings:
            variety = group.value("distinct_right") if task == "equation" else 0.0
            costs = group.value("cumulative_entropy"), group.value("num_evaluations")
            measured.append(Measured(setting, group.figures["right"], variety, *costs))
    return measured


def measure_exact(task: str, settings: Sequence[Setting], num: int, seeds: Sequence[int], folder: Path) -> list[Measured]:
    """Runs what is missing on an exact model; quality is the share of valid grids or minus the pixels that differ from a digit,
    variety is minus the energy distance."""
    model, path = exact.tasks_one_by_one()[task.removeprefix("exact-")], folder / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    records = {(line["name"], line["seed"]): line for line in (read_json_lines(path) if path.exists() else [])}
    names = [f"{name}{',' if ':' in name else ':'}tokens_per_step={count}" for name, count in settings]
    for name, seed in Progress(list(itertools.product(names, seeds)), desc=task, unit="run"):
        if (name, seed) not in records:
            result = model.run(exact.one_by_one(parse_sampler(name)), num, [seed_of_split(seed, SPLIT)])
            records[name, seed] = {**asdict(result), "seed": seed}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[name, seed]) + "\n")
    sign, measured = 1 if task == "exact-sudoku" else -1, []
    for name, setting in zip(names, settings, strict=True):
        own = [records[name, seed] for seed in seeds]
        spread = fmean(line["spread"] for line in own) / len(own) ** 0.5
        quality = Figure(sign * fmean(line["quality"] for line in own), spread, sum(line["samples"] for line in own))
        means = {key: fmean(line[key] for line in own) for key in ("energy_distance", "cumulative_entropy", "num_evaluations")}
        measured.append(Measured(setting, quality, -means["energy_distance"], *list(means.values())[1:]))
    return measured


def table(task: str, measured: Sequence[Measured]) -> str:
    """All settings by falling quality."""
    front = layers(measured)[0]
    rows = []
    for one in sorted(measured, key=lambda one: (-one.quality.value, one.num_evaluations)):
        cells = [one.setting[0], str(one.setting[1]), format_figure(one.quality, "right" if task in TEXT_TASKS else "")]
        rows.append([*cells, f"{one.variety:.3f}", f"{one.nats:.2f}", f"{one.num_evaluations:.2f}"])
        if one in front:
            rows[-1][0] = f"**{rows[-1][0]}**"
    header = ("sampler", "tokens a step", "quality", "variety", "nats", "NFE")
    return f"**{task}**, n = {measured[0].quality.n}\n\n{markdown_table(header, rows)}\n"


def save_frequencies(path: Path) -> None:
    """What pc_sampler reads: how often each character stands in texts like those that the model was trained on."""
    pipe, generator = InfoGainTextPipeline.from_pretrained("demo-text"), torch.Generator().manual_seed(0)
    samplers = (text_tasks.sample_multiplications, text_tasks.sample_sudokus)
    problems = [problem for sample in samplers for problem in sample(1000, generator, held_out=False)]
    texts = (pipe.tokenizer(problem.letter + problem.solution).input_ids for problem in problems)
    save_token_frequencies(token_frequencies(texts, pipe.model.config.vocab_size), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="for the records and tables")
    parser.add_argument("--tasks", nargs="+", choices=(*TEXT_TASKS, *EXACT_TASKS), default=[*TEXT_TASKS, *EXACT_TASKS])
    parser.add_argument(
        "--rules", nargs="+", choices=(*RULES, "halton", "pc_sampler", *PARALLEL), help="(default: all of the task)"
    )
    parser.add_argument("--num-screened", type=int, default=100, help="problems or samples of the first round")
    parser.add_argument("--num-kept", type=int, default=40, help="settings of the second round")
    parser.add_argument("--num", type=int, default=200, help="problems or samples of the second round")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the second round")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        of_text = task in TEXT_TASKS
        measure = measure_text if of_text else measure_exact
        rules = args.rules or [*RULES, "pc_sampler" if of_text else "halton", *PARALLEL]
        if "pc_sampler" in rules:
            frequencies = args.folder / "frequencies.safetensors"
            if not frequencies.exists():
                save_frequencies(frequencies)
            rules = [f"pc_sampler:pc_frequencies={frequencies}" if rule == "pc_sampler" else rule for rule in rules]
        digits = task in ("exact-digits", "exact-synonyms")
        settings = all_settings(rules, (*BOUNDS, 2, 4) if digits else BOUNDS, (1, 4, 8) if digits else (1, 2, 4))
        screened = measure(task, settings, args.num_screened, [0], args.folder / f"{task}-screened")
        best = [one.setting for one in itertools.chain(*layers(screened))][: args.num_kept]
        kept = measure(task, best, args.num, args.seeds, args.folder / task)
        report = f"{table(task, kept)}\nFirst round: {table(task, screened)}"
        (args.folder / f"{task}.md").write_text(report, encoding="utf-8")
        print(f"Written to {args.folder}: {task}.md")


if __name__ == "__main__":
    main()
