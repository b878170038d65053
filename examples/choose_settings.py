#!/usr/bin/env python
"""Finds the greedy settings that the demo model's samplers have to beat, on the captions that are for choosing.

python examples/choose_settings.py outputs/choose

Every greedy rule is combined with entropy bounds, top_p and token temperatures, with up to 64 steps. All settings are compared
on few images, with guidance first and the better half of them without guidance too, and those that do best for their cost on
more and more images (successive halving, Jamieson and Talwalkar 2016). A setting's gap is the accuracy by which it stays behind
the best setting that costs no more than it; costs are NFE or sequential passes, whichever gap is smaller. The settings with the
smallest gaps go on to the next round, of equal ones the cheaper, unless less than half of their images are right. Rules that
were the best of earlier comparisons stay in all rounds. Can be stopped and started again.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers_infogain.evaluation.groups import RIGHT, Group
from diffusers_infogain.evaluation.image_comparison import image_groups
from diffusers_infogain.files import read_json

# But for "entropy_bound", which is "entropy" with a bound, and "pc_sampler", which reads frequencies of texts.
RULES = ("confidence", "maskgit", "entropy", "margin", "uniform", "halton", "klass", "pivot", "left")
BOUNDS = (0.1, 0.25, 0.5, 1)
# Rules that decide by themselves how many tokens a step decodes, with the setting by which they do.
PARALLEL_RULES = {
    "confidence_parallel": ("parallel_threshold", (0.5, 0.7, 0.9)),
    "klass_parallel": ("parallel_threshold", (0.5, 0.7, 0.9)),
    "factor_parallel": ("parallel_factor", (0.5, 1)),
    "frechet_parallel": ("parallel_factor", (0.5, 1)),
}
TOP_PS = (1, 0.9)
TEMPERATURES = (1, 0.7)
GUIDANCE_SCALE, NO_GUIDANCE = 1.2, 1.0
COSTS = ("num_evaluations", "sequential_passes")

Setting = tuple[str, float]
"""A sampler as `compare` takes it, and a guidance scale."""

KNOWN: tuple[Setting, ...] = (
    ("maskgit:entropy_bound=0.25", GUIDANCE_SCALE),
    ("maskgit:entropy_bound=0.5", GUIDANCE_SCALE),
    ("pivot:entropy_bound=0.25,top_p=0.9", GUIDANCE_SCALE),
)


@dataclass(frozen=True)
class Round:
    """How many settings are compared on how many images, and how they are measured."""

    folder: str
    num_settings: int | None
    num_prompts: int
    num_images: int
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]


METRICS = ("composition", "frechet", "caption_variety")
SCREENING = Round("screened", None, 16, 1, (0,), ("composition",))
ROUNDS = (
    Round("chosen", 24, 48, 2, (0,), METRICS),
    Round("chosen", 12, 48, 2, (0, 1), METRICS),
    Round("chosen", 8, 48, 2, (0, 1, 2), METRICS),
)


def all_settings() -> list[Setting]:
    """Every setting with guidance."""
    rules = [f"{rule}:entropy_bound={bound}" for rule, bound in itertools.product(RULES, BOUNDS)]
    rules += [f"{rule}:{name}={value}" for rule, (name, values) in PARALLEL_RULES.items() for value in values]
    found = []
    for rule, top_p, temperature in itertools.product(rules, TOP_PS, TEMPERATURES):
        changes = [f"top_p={top_p}"] * (top_p != 1) + [f"token_temperature={temperature}"] * (temperature != 1)
        found.append((",".join([rule, *changes]), GUIDANCE_SCALE))
    return found


def gap(group: Group, groups: Sequence[Group]) -> float:
    """The accuracy by which a setting stays behind the best of all that cost no more, for the cost where it is smaller."""

    def behind(cost: str) -> float:
        return max(RIGHT.rank(other) for other in groups if other.value(cost) <= group.value(cost)) - RIGHT.rank(group)

    return min(map(behind, COSTS))


def smallest_gaps(groups: Sequence[Group], number: int) -> list[Setting]:
    """The settings that go on to the next round."""
    ranked = sorted(groups, key=lambda group: (gap(group, groups), group.value("num_evaluations")))
    good = [group for group in ranked if RIGHT.rank(group) >= 0.5]
    return [(group["sampler"], group["guidance_scale"]) for group in good[:number]]


def compare(settings: Sequence[Setting], step: Round, folder: Path) -> None:
    """Makes what is missing of these runs, with a table and plots of all in the folder."""
    for scale in dict.fromkeys(scale for _, scale in settings):
        arguments = ["compare", "--prompts", "demo-choose", "--num-prompts", step.num_prompts, "--num-images", step.num_images]
        arguments += ["--steps", 64, "--guidance-scales", scale, "--seeds", *step.seeds, "--metrics", *step.metrics]
        arguments += ["--device", "cpu", "--output", folder, "--everything"]
        arguments += ["--samplers", *(name for name, own in settings if own == scale)]
        command = [sys.executable, "-m", "diffusers_infogain.cli", *map(str, arguments)]
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(code)


def measure(settings: Sequence[Setting], step: Round, folder: Path) -> list[Group]:
    """The figures of settings in a round."""
    place = folder / step.folder
    compare(settings, step, place)
    records = [record for record in read_json(place / "results.json")["runs"] if record["seed"] in step.seeds]
    return image_groups(record for record in records if (record["sampler"], record["guidance_scale"]) in settings)


def choose(folder: Path) -> None:
    """All rounds."""
    guided = all_settings()
    groups = measure(guided, SCREENING, folder)
    groups += measure([(name, NO_GUIDANCE) for name, _ in smallest_gaps(groups, len(guided) // 2)], SCREENING, folder)
    for step in ROUNDS:
        settings = [*smallest_gaps(groups, step.num_settings), *KNOWN]
        groups = measure(list(dict.fromkeys(settings)), step, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="for the images, records and tables of all rounds")
    choose(parser.parse_args().folder)


if __name__ == "__main__":
    main()
