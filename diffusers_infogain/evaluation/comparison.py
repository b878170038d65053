"""Samplers x steps x candidates x guidance x seeds on the same prompts, and what can be said about the difference."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..choices import LOOKAHEAD_SAMPLERS, PRESETS, SAMPLERS
from ..decoding import count_model_calls
from ..files import METADATA_KEY, check_fields
from ..scheduling_infogain import InfoGainScheduler
from .runs import FinishedImage
from .statistics import Correlation, Figure, clustered_mean, figures_as_json, mean_over_seeds, pearson

SEARCHES = ("num_beams", "num_runs")
"""Settings of a sampler that are arguments of the pipeline's call."""
_SETTINGS = [name for name in inspect.signature(InfoGainScheduler.__init__).parameters if name not in ("self", "mask_token_id")]


DEFAULT = "default"
"""The sampler that is the pipeline's own, with its own settings."""


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler under a name: settings of the scheduler, and arguments of the pipeline's call."""

    name: str
    scheduler: dict[str, Any] = field(hash=False)
    call: dict[str, int] = field(hash=False)

    @property
    def looks_ahead(self) -> bool:
        """Whether it compares candidates, as "default" does unless `for_pipeline` says otherwise."""
        return self.scheduler.get("sampler", "info_gain") in LOOKAHEAD_SAMPLERS

    def for_pipeline(self, config: Mapping[str, Any]) -> SamplerSpec:
        """With the settings of the pipeline's scheduler where it is "default"; else as it is.

        Args:
            config: Of the pipeline's own scheduler.
        """
        if self.name.partition(":")[0] != DEFAULT:
            return self
        # A scheduler of the same class says all of its settings itself; another one's are those that both have.
        own = InfoGainScheduler.from_config(dict(config)).config
        return replace(self, scheduler={**{name: own[name] for name in _SETTINGS}, **self.scheduler})


def parse_sampler(text: str) -> SamplerSpec:
    """A sampler or preset, with settings after a colon: "maskgit", "paper", "info_gain:certainty=uniform,gain_weight=0.5".

    "default" stands for what the pipeline does by itself (see `SamplerSpec.for_pipeline`).

    A pair is written start:end, as in "maskgit:position_temperature=4:0"; "num_beams" and "num_runs" search with the sampler.

    Raises:
        ValueError: For an unknown name, or a setting that is not of the form key=value. Values are checked by the scheduler.
    """
    name, _, rest = text.partition(":")
    if name not in SAMPLERS and name not in PRESETS:
        raise ValueError(f"A sampler must be one of {', '.join((*SAMPLERS, *PRESETS))}, got {name!r} in {text!r}.")
    settings: dict[str, Any] = {} if name == DEFAULT else dict(PRESETS[name]) if name in PRESETS else {"sampler": name}
    for pair in rest.split(",") if rest else ():
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"A sampler's settings must have the form key=value,key=value, got {pair!r} in {text!r}.")
        if key not in (*_SETTINGS, *SEARCHES):
            raise ValueError(f"A sampler's setting must be one of {', '.join((*_SETTINGS, *SEARCHES))}, got {key!r} in {text!r}.")
        settings[key] = _value(value)
    call = {key: settings.pop(key) for key in SEARCHES if key in settings}
    return SamplerSpec(text, settings, call)


def check_recorded_sampler(text: str, where: str) -> None:
    """Raises a ValueError that says where a sampler stands, if it is none."""
    try:
        parse_sampler(text)
    except ValueError as error:
        raise ValueError(f"{where} is of no sampler that there is. {error}") from None


def _value(text: str) -> Any:
    if ":" in text:
        return [_value(part) for part in text.split(":")]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_PLAIN = re.compile(r"[A-Za-z0-9_.=]+(:[A-Za-z0-9_.=,]+)?")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison. `num_candidates` is None for a rule that does not look ahead."""

    sampler: SamplerSpec
    steps: int
    num_candidates: int | None
    guidance_scale: float
    seed: int

    @property
    def group(self) -> tuple[str, int, int | None, float]:
        """What it shares with the runs of other seeds."""
        return self.sampler.name, self.steps, self.num_candidates, self.guidance_scale

    @property
    def name(self) -> str:
        """A name for its folder."""
        candidates = "" if self.num_candidates is None else f"-n{self.num_candidates}"
        words = re.sub(r"[^A-Za-z0-9_.=]", "-", self.sampler.name)
        if len(words) > 100 or not _PLAIN.fullmatch(self.sampler.name):  # others could come to the same words
            words = f"{words[:100]}-{hashlib.sha256(self.sampler.name.encode()).hexdigest()[:8]}"
        scale = repr(float(self.guidance_scale)).removesuffix(".0")  # all digits: other scales are other runs
        return f"{words}-steps{self.steps}{candidates}-g{scale}-seed{self.seed}"


def grid(
    samplers: Iterable[SamplerSpec],
    steps: Iterable[int],
    num_candidates: Sequence[int] | None,
    guidance_scales: Iterable[float],
    seeds: Iterable[int],
    config: Mapping[str, Any],
) -> list[Cell]:
    """All runs, cheap ones first within a seed.

    Args:
        num_candidates: Of those that look ahead; None: each preset's own, else the pipeline's. A sampler that names its own after
            a colon is run with those only.
        config: Of the pipeline's own scheduler.
    """
    own = InfoGainScheduler.from_config(dict(config)).config["num_candidates"]
    cells = []
    specs = [sampler.for_pipeline(config) for sampler in samplers]
    for seed, guidance_scale, count, sampler in itertools.product(seeds, guidance_scales, steps, specs):
        if not sampler.looks_ahead:
            numbers: Sequence[int | None] = [None]
        elif num_candidates is None or "num_candidates=" in sampler.name:
            numbers = [sampler.scheduler.get("num_candidates", own)]
        else:
            numbers = num_candidates
        cells += [Cell(sampler, count, number, guidance_scale, seed) for number in numbers]
    return sorted(dict.fromkeys(cells), key=lambda cell: (cell.seed, cell.steps * (cell.num_candidates or 1)))


def describe_run(images: Sequence[FinishedImage], looks_ahead: bool) -> dict[str, Any]:
    """What the files of a run tell about its decoding: rows, entropies, and how often a candidate other than the first won.

    "model_rows" is what decoding costs where the device is busy with every row, "model_calls" where candidates run side by side.
    """
    for image in images:
        where = f"The text chunk {METADATA_KEY!r} of {image.path}"
        check_fields(image.metadata, where, {"cost": [float], "model_rows": [int], "winner": [int]})
        if not len(image.metadata["cost"]) == len(image.metadata["model_rows"]) == len(image.metadata["winner"]):
            raise ValueError(f"{where} must have as many `cost` as `model_rows` and `winner`.")
    records = [image.metadata for image in images]
    steps = max(len(record["cost"]) for record in records)
    costs = [record["cost"] + [0.0] * (steps - len(record["cost"])) for record in records]
    decisions, others, calls = [0] * steps, [0] * steps, 0
    for record in records:
        calls += int(count_model_calls(torch.tensor(record["model_rows"])[:, None], looks_ahead))
        for step, (rows, winner) in enumerate(zip(record["model_rows"], record["winner"], strict=True)):
            decisions[step] += looks_ahead and rows - (step == 0) > 1
            others[step] += winner != 0
    totals = list(itertools.accumulate(sum(step) / len(records) for step in zip(*costs, strict=True)))
    return {
        "model_rows": sum(sum(record["model_rows"]) for record in records) / len(records),
        "model_calls": calls / len(records),
        "cumulative_entropies": [round(sum(cost), 3) for cost in costs],
        "entropy_by_step": [round(total, 4) for total in totals],
        "decisions_by_step": decisions,
        "other_winner_by_step": others,
    }


@dataclass
class Group:
    """A configuration over its seeds."""

    sampler: str
    steps: int
    num_candidates: int | None
    guidance_scale: float
    looks_ahead: bool
    seeds: list[int]
    figures: dict[str, Figure]
    results: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """Its name in tables and plots."""
        return self.sampler if self.num_candidates is None else f"{self.sampler}, N {self.num_candidates}"

    def figure(self, name: str) -> float:
        """The value of a figure; NaN where it has none."""
        return self.figures[name].value if name in self.figures else float("nan")


def summarize(results: Iterable[dict[str, Any]]) -> list[Group]:
    """Groups the results of runs (as `compare` stores them) by configuration.

    Figures of a metric are left out where runs were measured by it in different ways, or some of a group's not at all.
    """
    results, by_group = list(results), defaultdict(list)
    ways: dict[str, list[Any]] = defaultdict(list)
    for result in results:
        for metric, measured in result["metrics"].items():
            if measured["identity"] not in ways[metric]:
                ways[metric].append(measured["identity"])
    for result in results:
        by_group[result["sampler"], result["steps"], result["num_candidates"], result["guidance_scale"]].append(result)
    groups = []
    for key, members in by_group.items():
        members.sort(key=lambda result: result["seed"])
        n = sum(len(result["cumulative_entropies"]) for result in members)
        figures = {}
        for name, values in (("right", _right(members)), ("cumulative_entropy", _entropies(members))):
            if values is not None:
                figures[name] = clustered_mean([v for run in values for v in run], [p for r in members for p in _prompts(r)])
        for name in ("model_rows", "model_calls", "seconds_per_image", "peak_memory"):
            known = [result[name] for result in members if result.get(name) is not None]
            if known:
                figures[name] = mean_over_seeds(known, n)
        for metric in members[0]["metrics"]:
            if len(ways[metric]) == 1 and all(metric in member["metrics"] for member in members):
                measured = [member["metrics"][metric]["figures"] for member in members]
                figures |= {name: mean_over_seeds([one[name] for one in measured], n) for name in measured[0]}
        seeds = [result["seed"] for result in members]
        groups.append(Group(*key, members[0]["looks_ahead"], seeds, figures, members))
    return groups


def _right(results: Sequence[dict[str, Any]]) -> list[list[float]] | None:
    """Per run and image: 1 where it keeps its prompt; None if that was not checked."""
    if any(result.get("right") is None for result in results):
        return None
    return [[float(digit) for digit in result["right"]] for result in results]


def _entropies(results: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [result["cumulative_entropies"] for result in results]


def _prompts(result: dict[str, Any]) -> list[int]:
    return [index // result["num_images_per_prompt"] for index in range(len(result["cumulative_entropies"]))]


def difference(first: Group, second: Group) -> Figure | None:
    """Share of right images of `first` minus that of `second`, paired by prompt and seed; None without common seeds."""
    one, two = ({r["seed"]: r for r in group.results} for group in (first, second))
    common = sorted(one.keys() & two.keys())
    values = [_right([one[seed], two[seed]]) for seed in common]
    if not values or any(value is None for value in values):
        return None
    gaps = [a - b for value in values if value is not None for a, b in zip(*value, strict=True)]
    return clustered_mean(gaps, [prompt for seed in common for prompt in _prompts(one[seed])])


@dataclass(frozen=True)
class Quality:
    """The figure that samplers are ranked by."""

    name: str
    higher_is_better: bool

    def of(self, group: Group) -> Figure | None:
        """Its value for a group."""
        return group.figures.get(self.name)

    def rank(self, group: Group) -> float:
        """Larger is better."""
        return group.figure(self.name) * (1 if self.higher_is_better else -1)


def best_greedy(groups: Sequence[Group], like: Group, quality: Quality, *, equal: str) -> Group | None:
    """The best rule without lookahead that takes no more model rows, and at equal="model_calls" no more calls in sequence either.

    Rules with more steps, with an entropy bound and best-of-N runs of them compete (2 % of tolerance). The best is chosen by the
    very figures it is then compared on, which favours it.
    """
    if equal not in ("model_calls", "model_rows"):
        raise ValueError(f"`equal` must be one of model_calls, model_rows, got {equal!r}.")
    limits = {name: 1.02 * like.figure(name) for name in {"model_rows", equal}}
    rivals = [
        group
        for group in groups
        if not group.looks_ahead
        and group.guidance_scale == like.guidance_scale
        and quality.of(group) is not None
        and all(group.figure(name) <= limit for name, limit in limits.items())
    ]
    return max(rivals, key=quality.rank, default=None)


LOWER_IS_BETTER = ("FID", "sFID", "FD", "KID", "cumulative_entropy")


def choose_quality(groups: Sequence[Group]) -> Quality:
    """Right images if they were checked, else the first of FID, another Fréchet distance, KID, CLIP score; else the entropy."""
    names = [name for group in groups for name in group.figures]
    for wanted in ("right", "FID", "FD", "KID", "CLIP score", "cumulative_entropy"):
        for name in names:
            if name == wanted or name.startswith(wanted + " "):
                return Quality(name, wanted not in LOWER_IS_BETTER)
    raise ValueError("The results hold no figure to rank samplers by.")


def pareto_front(groups: Sequence[Group], quality: Quality, cost: str = "model_rows") -> list[Group]:
    """The groups that no other one beats at the same cost or less, by cost."""
    front: list[Group] = []
    for group in sorted(groups, key=lambda group: (group.figure(cost), -quality.rank(group))):
        if not front or quality.rank(group) > quality.rank(front[-1]):
            front.append(group)
    return front


def quality_entropy_correlation(groups: Sequence[Group], quality: Quality) -> Correlation:
    """Pearson's r between quality and cumulative entropy over configurations."""
    return pearson([group.figure("cumulative_entropy") for group in groups], [group.figure(quality.name) for group in groups])


def as_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The summary for results.json: every figure with its standard error (null where it is unknown) and n."""
    keys = ("sampler", "steps", "num_candidates", "guidance_scale", "seeds")
    return [{**{key: getattr(group, key) for key in keys}, "figures": figures_as_json(group.figures)} for group in groups]
