"""What can be said about samplers from the records of their runs, of images and of texts alike: one group per configuration,
with the figures of its runs over all seeds, and comparisons of groups.

A record is what a comparison stores of one run, as JSON. Of "right" (a string with a 1 or 0 for every image or text, or None if
nothing was checked) and "cumulative_entropies" it has one entry per image or text. Standard errors are cluster-robust: all images
or texts of one prompt form a cluster, over the seeds too.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .samplers import LOOKS_BACK, SamplerSpec, parse_sampler
from .statistics import Correlation, Figure, clustered_mean, figures_as_json, mean_over_seeds, pearson

Record = dict[str, Any]
Column = Callable[[Sequence[Record]], Figure | None]
"""Gives a figure of a group from the records of its runs; None where it is not known."""


class Cell:
    """One run of a comparison. Subclasses are frozen dataclasses whose fields tell it from all others."""

    sampler: SamplerSpec
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """The fields as records hold them: the sampler by its name."""
        return {**vars(self), "sampler": self.sampler.name}

    def find(self, records: Iterable[Record]) -> Record | None:
        """The record of this run, if it is finished."""
        return next((record for record in records if all(record[name] == value for name, value in self.key.items())), None)


@dataclass
class Group:
    """The runs of one configuration, which differ in nothing but the seed.

    Attributes:
        key: The configuration: "sampler", and what else the comparison varies.
        figures: By name; a figure that is not known for all runs is left out.
        records: Of the runs, ordered by seed.
    """

    key: dict[str, Any]
    figures: dict[str, Figure]
    records: list[Record]

    def __getitem__(self, name: str) -> Any:
        """A setting of the configuration."""
        return self.key[name]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs, ascending."""
        return [record["seed"] for record in self.records]

    @property
    def looks_ahead(self) -> bool:
        """Whether the sampler compares candidates by a lookahead."""
        return self.records[0]["looks_ahead"]

    @property
    def greedy(self) -> bool:
        """Whether the sampler neither looks ahead, nor back, nor searches, and guides all steps alike."""
        looks_back = any(self.records[0]["scheduler"].get(name) is not None for name in LOOKS_BACK)
        return not (self.looks_ahead or looks_back) and parse_sampler(self["sampler"]).call.keys() <= {"guidance_scale"}

    @property
    def label(self) -> str:
        """The sampler's name in tables and plots, with the number of candidates where the comparison varies it."""
        candidates = self.key.get("num_candidates")
        return self["sampler"] if candidates is None else f"{self['sampler']}, N {candidates}"

    def value(self, name: str) -> float:
        """The value of a figure, or NaN if the group does not have it."""
        return self.figures[name].value if name in self.figures else math.nan

    @cached_property
    def verdicts(self) -> dict[tuple[int, int, int], float]:
        """1.0 for a right image or text and 0.0 for a wrong one, by seed, prompt, and index in the run; of checked runs only."""
        return {
            (record["seed"], prompt, index): float(digit)
            for record in self.records
            if record["right"] is not None
            for index, (prompt, digit) in enumerate(zip(_prompts(record), record["right"], strict=True))
        }


def _prompts(record: Record) -> list[int]:
    """The number of its prompt for every image or text of a run."""
    copies = record.get("num_images_per_prompt", 1)
    return [index // copies for index in range(len(record["cumulative_entropies"]))]


def _size(records: Iterable[Record]) -> int:
    return sum(len(record["cumulative_entropies"]) for record in records)


def _at(record: Any, path: Sequence[str]) -> Any:
    """What a record holds under these keys inside each other, or None."""
    for name in path:
        record = record.get(name) if isinstance(record, dict) else None
    return record


def per_item(*path: str) -> Column:
    """The mean of a list under these keys inside each other: a value for every image or text, None for those that have none."""

    def figure(records: Sequence[Record]) -> Figure | None:
        lists = [_at(record, path) for record in records]
        if any(values is None for values in lists):
            return None
        pairs = zip(lists, records, strict=True)
        items = [item for values, record in pairs for item in zip(values, _prompts(record), strict=True) if item[0] is not None]
        return clustered_mean([float(value) for value, _ in items], [prompt for _, prompt in items]) if items else None

    return figure


def per_run(*path: str) -> Column:
    """The mean over the seeds of one number for the whole run, which records hold under these keys inside each other."""

    def figure(records: Sequence[Record]) -> Figure | None:
        values = [_at(record, path) for record in records]
        return None if None in values else mean_over_seeds(values, _size(records))

    return figure


def per_run_and_item(field: str) -> Column:
    """A total of each run divided by its number of texts, then averaged over the seeds, without a standard error."""

    def figure(records: Sequence[Record]) -> Figure:
        shares = [record[field] / _size([record]) for record in records]
        return Figure(sum(shares) / len(shares), math.nan, _size(records))

    return figure


def summarize(records: Iterable[Record], key: Sequence[str], columns: Mapping[str, Column]) -> list[Group]:
    """Groups the records of runs by their configuration, in the order in which configurations first occur.

    Args:
        key: The fields that make up the configuration.
        columns: How each figure comes from a group's records.
    """
    by_key: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        by_key[tuple(record[name] for name in key)].append(record)
    groups = []
    for values, own in by_key.items():
        own.sort(key=lambda record: record["seed"])
        figures = {name: figure for name, column in columns.items() if (figure := column(own)) is not None}
        groups.append(Group(dict(zip(key, values, strict=True)), figures, own))
    return groups


def as_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A summary for JSON: every figure with its standard error (null where it is unknown) and n."""
    return [{**group.key, "seeds": group.seeds, "figures": figures_as_json(group.figures)} for group in groups]


def difference(first: Group, second: Group) -> Figure | None:
    """Share of right images or texts of `first` minus that of `second`, paired by seed and prompt; None without common pairs."""
    common = sorted(first.verdicts.keys() & second.verdicts.keys())
    if not common:
        return None
    return clustered_mean([first.verdicts[item] - second.verdicts[item] for item in common], [prompt for _, prompt, _ in common])


@dataclass(frozen=True)
class Quality:
    """The figure that ranks samplers, and whether a higher one is better."""

    name: str
    higher_is_better: bool

    def rank(self, group: Group) -> float:
        """The figure of a group, negated where lower is better: larger ranks higher."""
        return group.value(self.name) * (1 if self.higher_is_better else -1)


RIGHT = Quality("right", True)
"""The share of right images or texts."""
_BY_RANK = (
    "right",
    *("FID", "clean-FID", "FD-DINOv2", "FD", "FID∞", "clean-FID∞", "FD-DINOv2∞", "FD∞"),
    *("KID", "clean-KID", "kernel distance", "CMMD", "MMD"),
    *("HPSv2.1", "PickScore", "HPSv2", "ImageReward", "CLIP score"),
    "cumulative_entropy",
)
_HIGHER_IS_BETTER = ("right", "HPSv2.1", "PickScore", "HPSv2", "ImageReward", "CLIP score")


def choose_quality(groups: Sequence[Group]) -> Quality:
    """The share of right images if they were checked, else the first of FID, FD-DINOv2, another Fréchet distance, FD∞, KID,
    CMMD, HPSv2.1, PickScore, HPSv2, ImageReward and CLIP score that was measured, else the cumulative entropy.

    Raises:
        ValueError: If the groups have none of these figures.
    """
    names = [name for group in groups for name in group.figures]
    for wanted in _BY_RANK:
        for name in names:
            if name == wanted or name.startswith(wanted + " "):
                return Quality(name, wanted in _HIGHER_IS_BETTER)
    raise ValueError("The results hold no figure to rank samplers by.")


def greedy_rules(chosen: Sequence[Group], quality: Quality) -> list[Group]:
    """The greedy rules among these that were measured on most images: fewer images than others have make lucky winners."""
    rules = [group for group in chosen if group.greedy and quality.name in group.figures]
    most = max((group.figures[quality.name].n for group in rules), default=0)
    return [group for group in rules if group.figures[quality.name].n == most]


def best_greedy(
    group: Group,
    chosen: Sequence[Group],
    measured: Sequence[Group],
    quality: Quality,
    *,
    same: Sequence[str] = (),
    limit: str | None = None,
) -> Group | None:
    """The best greedy rule that costs no more than `group`, chosen by figures on other prompts or seeds than it is compared on.

    Chosen by the figures that it is then compared on, a rival would owe some of its rank to luck, and a sampler that is not in
    the comparison could not be one.

    Args:
        chosen: All settings that were measured to choose from (see `greedy_rules`).
        measured: The settings of the present comparison. A cost is the one that a setting has here, if it was measured here.
        same: The settings to share with `group`.
        limit: The figure, such as "num_evaluations", that may be at most that of `group`, with a tolerance of 2 %.

    Returns:
        One of `measured` if the rival was measured here, otherwise one of `chosen`; None if no rule is that cheap.

    Raises:
        ValueError: For a limit that is not a figure of `group`.
    """
    if limit is not None and limit not in group.figures:
        raise ValueError(f"`limit` must be among the figures {', '.join(group.figures)}, got {limit!r}.")
    found = []
    for rival in greedy_rules([other for other in chosen if all(other[name] == group[name] for name in same)], quality):
        here = next((other for other in measured if other.key == rival.key), rival)
        if limit is None or here.value(limit) <= 1.02 * group.value(limit):
            found.append((quality.rank(rival), here))
    return max(found, key=lambda item: item[0], default=(math.nan, None))[1]


def possible_rivals(chosen: Sequence[Group], quality: Quality, limits: Sequence[str]) -> list[Group]:
    """The greedy rules that `best_greedy` may come upon: those that are best at their cost, by one of these costs."""
    rules = greedy_rules(chosen, quality)
    found = [group for limit in limits for group in pareto_front(rules, quality, [limit])]
    return [group for group in rules if any(group is other for other in found)]


def pareto_front(groups: Sequence[Group], quality: Quality, costs: Sequence[str] = ("num_evaluations",)) -> list[Group]:
    """The groups that no other one dominates, by ascending cost: none is as good for no more of any cost, and better in one."""

    def of(group: Group) -> list[float]:
        return [quality.rank(group), *(-group.value(cost) for cost in costs)]

    def dominated(group: Group) -> bool:
        own = of(group)
        return any(all(map(operator.ge, of(other), own)) and of(other) != own for other in groups)

    ranked = [group for group in groups if quality.name in group.figures]
    return sorted((group for group in ranked if not dominated(group)), key=lambda group: group.value(costs[0]))


def quality_entropy_correlation(groups: Sequence[Group], quality: Quality) -> Correlation:
    """Pearson's r between quality and cumulative entropy over configurations."""
    return pearson([group.value("cumulative_entropy") for group in groups], [group.value(quality.name) for group in groups])
