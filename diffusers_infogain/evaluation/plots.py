"""Plots of comparisons, as PNG files. A sampler has the same color, marker and name in all of them (see `looks`)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..choices import PRESETS
from ..extras import missing
from ..files import replacing
from .groups import Group, Quality, pareto_front, quality_entropy_correlation
from .labels import Label, write_labels
from .looks import OTHERS, ink, styles
from .samplers import SEARCHES, describe_sampler, parse_sampler
from .tables import SCALE, correlation_text, title_of

Curve = tuple[list[float], list[float]]
"""The x and y of points."""

MAX_SERIES = 6
"""Samplers that a plot names and colors; more are gray, since nobody could tell them apart."""
_FRONT_COLOR = "0.88"


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise missing("Plots need", "matplotlib", "eval", "matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _scaled(group: Group, name: str) -> float:
    return SCALE.get(name, 1) * group.value(name)


def _scaled_errors(groups: Sequence[Group], name: str) -> list[float]:
    """Standard errors, 0 where they are unknown, so that no bar is drawn."""
    errors = [group.figures[name].standard_error for group in groups]
    return [0 if math.isnan(error) else SCALE.get(name, 1) * error for error in errors]


@dataclass(frozen=True)
class _Series:
    """Groups that differ only in steps, candidates and entropy bound, with one name and one look for all plots."""

    label: str
    groups: list[Group]
    style: dict[str, Any]

    def strands(self, cost: str) -> list[list[Group]]:
        """Groups that differ in one setting only, for a line to join: in the entropy bound if they have one, else in steps."""
        strands: dict[tuple[int | None, int | None], list[Group]] = {}
        for group in sorted(self.groups, key=lambda group: group.value(cost)):
            bounded = re.search(r"entropy_bound=(?!0(,|$))", group["sampler"])
            strands.setdefault((group["num_candidates"], group["steps"] if bounded else None), []).append(group)
        return list(strands.values())


def choose_series(groups: Sequence[Group], quality: Quality, names: Sequence[str] = ()) -> list[_Series]:
    """The samplers that plots name: presets first, then those on a Pareto front, then those with the most configurations.

    Args:
        names: Selects these samplers instead, by their names in plots (see `describe_sampler`).

    Raises:
        ValueError: If none of the groups has one of these names, or if they are more than `MAX_SERIES`.
    """
    scales = [group["guidance_scale"] for group in groups]
    usual = max(scales, key=scales.count)
    families: dict[str, list[Group]] = {}
    for group in groups:
        guidance = "" if group["guidance_scale"] == usual else f", guidance {group['guidance_scale']:g}"
        families.setdefault(describe_sampler(group["sampler"], bounds=False) + guidance, []).append(group)
    fronts = [group for cost in ("num_evaluations", "sequential_passes") for group in pareto_front(groups, quality, [cost])]

    def interest(label: str) -> tuple[bool, int, int]:
        members = families[label]
        on_fronts = sum(_is_among(group, fronts) for group in members)
        return members[0]["sampler"] in PRESETS and members[0]["guidance_scale"] == usual, on_fronts, len(members)

    unknown = [name for name in names if name not in families]
    if unknown:
        raise ValueError(f"`names` must be among {'; '.join(sorted(families))}, got {unknown[0]!r}.")
    if len(names) > MAX_SERIES:
        raise ValueError(f"`names` must be at most {MAX_SERIES}, got {len(names)}.")
    labels = names or sorted(families, key=lambda label: (*(-value for value in interest(label)), label))[:MAX_SERIES]
    looks = styles([families[label][0]["sampler"] for label in labels])
    return [_Series(label, families[label], look) for label, look in zip(labels, looks, strict=True)]


def _is_among(group: Group, groups: Sequence[Group]) -> bool:
    return any(group is other for other in groups)


def _others(groups: Sequence[Group], named: Sequence[Group]) -> list[Group]:
    """The groups that a plot does not name."""
    return [group for group in groups if not _is_among(group, named)]


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
    load_pyplot().close(figure)


def _canvas(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure, axes = load_pyplot().subplots(figsize=(9, 5.5), layout="constrained")
    axes.set_title(title, loc="left", fontsize=11, pad=26)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.06, 0.12)  # room for names
    return figure, axes


def _add_legend(axes: Any) -> None:
    """What is not named beside it, in one line above the picture."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=4, borderaxespad=0)


def _plot_others(axes: Any, points: Curve) -> None:
    """Gray dots, counted in the legend."""
    if points[0]:
        several = "s" if len(points[0]) > 1 else ""
        label = f"{len(points[0])} other configuration{several}"
        axes.plot(*points, color=OTHERS, marker=".", markersize=8, linestyle="none", zorder=1.2, label=label)


def _plot_series(axes: Any, points: Curve, errors: Sequence[float], style: dict[str, Any]) -> None:
    """Markers with bars of one standard error, joined by a line."""
    bars = {"ecolor": style["color"], "elinewidth": 1, "markeredgewidth": 1.2, "linewidth": 1.2}
    axes.errorbar(*points, errors, **bars, **style)


def _pairs(points: Curve) -> list[tuple[float, float]]:
    return list(zip(*points, strict=True))


def plot_pareto(groups: Sequence[Group], quality: Quality, series: Sequence[_Series], path: Path, cost: str) -> None:
    """Quality against a cost, with the best that there is at no more cost as a broad line."""
    better = "" if quality.higher_is_better else ", lower is better"
    title = f"{title_of(quality.name)} against {title_of(cost)} per image, ± one standard error"
    figure, axes = _canvas(title[0].upper() + title[1:], f"{title_of(cost)} per image", title_of(quality.name) + better)

    def points(members: Sequence[Group]) -> Curve:
        return [group.value(cost) for group in members], [_scaled(group, quality.name) for group in members]

    front = points(pareto_front(groups, quality, [cost]))
    label = "frontier: the best at no more cost"
    axes.plot(*front, color=_FRONT_COLOR, linewidth=8, solid_capstyle="round", drawstyle="steps-post", zorder=0, label=label)
    _plot_others(axes, points(_others(groups, [group for line in series for group in line.groups])))
    labels = []
    for line in series:
        for members in line.strands(cost):
            _plot_series(axes, points(members), _scaled_errors(members, quality.name), line.style)
        labels.append(Label(line.label, ink(line.style["color"]), _pairs(points(line.groups))))
    costs = [group.value(cost) for group in groups]
    if max(costs) > 4 * min(costs) > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    _add_legend(axes)
    write_labels(axes, labels)
    _save(figure, path)


def plot_variety(groups: Sequence[Group], path: Path) -> None:
    """Right against distinct answers to one text task; a line joins samplers that differ only in their token temperature."""
    families: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        sampler = re.sub(r"(?<=[:,])token_temperature=[^,]+,?", "", group["sampler"]).rstrip(",:")
        families.setdefault((sampler, group["tokens_per_step"]), []).append(group)
    front = _best_of_both(groups)

    def interest(key: tuple[str, int]) -> tuple[bool, int, int]:
        members = families[key]
        return key[0] in PRESETS, sum(_is_among(group, front) for group in members), len(members)

    chosen = sorted(families, key=lambda key: tuple(-value for value in interest(key)))[:MAX_SERIES]
    several = len({per_step for _, per_step in families}) > 1
    title = f"{groups[0]['task'].capitalize()}: right against distinct answers, ± one standard error"
    figure, axes = _canvas(title, "distinct answers (%)", "right answers (%)")

    def points(members: Sequence[Group]) -> Curve:
        return [_scaled(group, "distinct") for group in members], [_scaled(group, "right") for group in members]

    label = "frontier: no other has more of both"
    axes.plot(*points(front), color=_FRONT_COLOR, linewidth=8, solid_capstyle="round", zorder=0, label=label)
    _plot_others(axes, points(_others(groups, [group for key in chosen for group in families[key]])))
    labels = []
    for (sampler, per_step), style in zip(chosen, styles([sampler for sampler, _ in chosen]), strict=True):
        members = sorted(families[sampler, per_step], key=lambda group: group.value("distinct"))
        _plot_series(axes, points(members), _scaled_errors(members, "right"), style)
        name = describe_sampler(sampler) + (f", {per_step} a step" if several else "")
        labels.append(Label(name, ink(style["color"]), _pairs(points(members))))
    _add_legend(axes)
    write_labels(axes, labels)
    _save(figure, path)


def _best_of_both(groups: Sequence[Group]) -> list[Group]:
    """The groups that no other one has both more right and more distinct answers than, by the latter."""

    def beaten(group: Group) -> bool:
        own = group.value("right"), group.value("distinct")
        found = [(other.value("right"), other.value("distinct")) for other in groups]
        return any(right >= own[0] and distinct >= own[1] and (right, distinct) != own for right, distinct in found)

    return sorted((group for group in groups if not beaten(group)), key=lambda group: group.value("distinct"))


def _representatives(groups: Sequence[Group], series: Sequence[_Series]) -> list[tuple[Group, _Series]]:
    """For every series and number of candidates the group with most steps, as many as a plot can name."""
    chosen = []
    for line in series:
        own = [group for group in line.groups if _is_among(group, groups)]
        most_steps = {group["num_candidates"]: group for group in sorted(own, key=lambda group: group["steps"])}
        by_candidates = sorted(most_steps.values(), key=lambda group: -(group["num_candidates"] or 0))
        chosen += [(rank, group, line) for rank, group in enumerate(by_candidates)]
    chosen.sort(key=lambda item: item[0])
    return [(group, line) for _, group, line in chosen[:MAX_SERIES]]


def _name_of(group: Group) -> str:
    """The sampler in words, with its number of candidates."""
    candidates = "" if group["num_candidates"] is None else f", N = {group['num_candidates']}"
    return describe_sampler(group["sampler"]) + candidates


def plot_trajectories(groups: Sequence[Group], series: Sequence[_Series], path: Path, steps: int) -> None:
    """Cumulative entropy along the decoding, of the configurations with this number of steps."""
    shown = [group for group in groups if group["steps"] == steps]
    named = _representatives(shown, series)
    figure, axes = _canvas(f"Cumulative entropy along the steps, at most {steps}; mean over images", "step", "nats")
    others = _others(shown, [group for group, _ in named])
    for number, group in enumerate(others):
        label = None if number else f"{len(others)} other configuration{'s' if len(others) > 1 else ''}"
        axes.plot(*_entropy_by_step(group), color=OTHERS, linewidth=0.8, zorder=1, label=label)
    labels = []
    for group, line in named:
        curve = _entropy_by_step(group)
        axes.plot(*curve, linewidth=1.2, **{**line.style, "markersize": 5})
        labels.append(Label(_name_of(group), ink(line.style["color"]), _pairs(curve)[len(curve[0]) // 3 :]))
    _add_legend(axes)
    write_labels(axes, labels)
    _save(figure, path)


def _entropy_by_step(group: Group) -> Curve:
    runs = [record["entropy_by_step"] for record in group.records]
    mean = [sum(values) / len(values) for values in zip(*runs, strict=False)]
    return list(range(1, len(mean) + 1)), mean


def plot_quality_entropy(groups: Sequence[Group], quality: Quality, series: Sequence[_Series], path: Path) -> None:
    """Quality against cumulative entropy, one point per configuration, with Pearson's r."""
    title = correlation_text(quality_entropy_correlation(groups, quality))
    figure, axes = _canvas(title[0].upper() + title[1:], "cumulative entropy (nats)", title_of(quality.name))

    def points(members: Sequence[Group]) -> Curve:
        return [group.value("cumulative_entropy") for group in members], [_scaled(group, quality.name) for group in members]

    labels = []
    for line in series:
        axes.plot(*points(line.groups), **{**line.style, "linestyle": "none"})
        labels.append(Label(line.label, ink(line.style["color"]), _pairs(points(line.groups))))
    _plot_others(axes, points(_others(groups, [group for line in series for group in line.groups])))
    _add_legend(axes)
    write_labels(axes, labels)
    _save(figure, path)


def plot_decisions(groups: Sequence[Group], quality: Quality, path: Path) -> None:
    """In how many steps per image a lookahead compared candidates, and in how many it took another than the first, greedy one.

    A lazy sampler compares only where it rejected the first candidate, so how often another one won there says little, and
    chance is drawn for those only that compare all candidates. Searches, whose steps are those of several samples, are left out.
    """
    shown = [group for group in groups if group.looks_ahead and not set(SEARCHES) & set(parse_sampler(group["sampler"]).call)]
    named = _representatives(shown, choose_series(shown, quality)) if shown else []
    title = "In how many steps a lookahead decided"
    others = len(shown) - len(named)
    figure, axes = _canvas(title + f" ({others} other configurations are not shown)" * (others > 0), "steps per image", "")
    axes.grid(axis="y", visible=False)
    chances = []
    for row, (group, line) in enumerate(named):
        compared, other = (_steps_per_image(group, name) for name in ("decisions_by_step", "other_winner_by_step"))
        color = line.style["color"]
        axes.barh(row, compared, color=color, alpha=0.3, height=0.4)
        axes.barh(row, other, color=color, height=0.4)
        axes.text(0, row - 0.24, _name_of(group), va="bottom", fontsize=9)
        lazy = group.records[0]["scheduler"].get("lazy_threshold") is not None
        words = "rejected the first" if lazy else "compared all"
        axes.text(
            compared, row, f"  {words}: {compared:.2g}, took another: {other:.2g}", va="center", fontsize=9, color=ink(color)
        )
        if not lazy and group["num_candidates"]:
            chances.append(((1 - 1 / group["num_candidates"]) * compared, row))
    if chances:
        axes.plot(*zip(*chances, strict=True), color="black", linestyle="none", marker="|", markersize=18, label="chance")
    axes.set_yticks([])
    axes.set_ylim(max(len(named), 1) - 0.5, -0.8)
    axes.set_xlim(0, 1.7 * max([1e-3, *(_steps_per_image(group, "decisions_by_step") for group, _ in named)]))
    axes.bar(0, 0, color="0.5", alpha=0.4, label="candidates were compared")
    axes.bar(0, 0, color="0.4", label="another than the first was taken")
    _add_legend(axes)
    _save(figure, path)


def _steps_per_image(group: Group, name: str) -> float:
    return sum(sum(record[name]) for record in group.records) / sum(len(r["cumulative_entropies"]) for r in group.records)


def write_plots(groups: Sequence[Group], quality: Quality, folder: Path) -> list[Path]:
    """All plots of a comparison on images, with the same samplers in the same colors; returns their files."""
    series = choose_series(groups, quality)
    paths = [folder / name for name in ("pareto_rows.png", "pareto_calls.png", "decisions.png")]
    plot_pareto(groups, quality, series, paths[0], "num_evaluations")
    plot_pareto(groups, quality, series, paths[1], "sequential_passes")
    plot_decisions(groups, quality, paths[2])
    if quality.name != "cumulative_entropy":
        paths.append(folder / "quality_entropy.png")
        plot_quality_entropy(groups, quality, series, paths[-1])
    for steps in sorted({group["steps"] for group in groups}):
        paths.append(folder / f"entropy_{steps}_steps.png")
        plot_trajectories(groups, series, paths[-1], steps)
    return paths
