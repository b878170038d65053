"""Plots of comparisons, as PNG files. A sampler has the same color and name in all plots."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..choices import PRESETS
from ..extras import missing
from ..files import replacing
from .groups import Group, Quality, pareto_front, quality_entropy_correlation
from .samplers import color_of, describe_sampler
from .tables import SCALE, correlation_text, title_of

Curve = tuple[list[float], list[float]]
"""The x and y of points."""

MAX_SERIES = 6
"""Samplers that a plot names and colors; more are gray, since nobody could tell them apart."""
_LINE_STYLES = ("-", "--", ":", "-.")
_GRAY = "0.8"


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
        ValueError: If none of the groups has one of these names.
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
    labels = names or sorted(families, key=lambda label: (*(-value for value in interest(label)), label))[:MAX_SERIES]
    styles = _styles([families[label][0] for label in labels])
    for style in styles:
        if style["linestyle"] != "-":
            style["markerfacecolor"] = "white"
    return [_Series(label, families[label], style) for label, style in zip(labels, styles, strict=True)]


def _styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A look for each: colored by its sampler, with another line style for each further one of that color; circles look ahead,
    squares do not."""
    styles: list[dict[str, Any]] = []
    for group in groups:
        color = color_of(group["sampler"])
        line = _LINE_STYLES[sum(style["color"] == color for style in styles) % len(_LINE_STYLES)]
        styles.append({"color": color, "linestyle": line, "marker": "o" if group.looks_ahead else "s"})
    return styles


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
    figure, axes = load_pyplot().subplots(figsize=(11, 5.5), layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _name_lines(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the picture, each with a thin line to the end (x, y) of what it names, in its color; none over another."""
    axes.figure.draw_without_rendering()  # settles the limits
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((to_axes.transform((x, y))[1], (x, y), text, color) for x, y, text, color in ends)
    levels = _spread([height for height, *_ in placed], gap=0.05, highest=0.97)
    for level, (_, end, text, color) in zip(levels, placed, strict=True):
        axes.annotate(
            text,
            xy=end,
            xytext=(1.04, level),
            textcoords="axes fraction",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            ha="left",
            arrowprops={"relpos": (0, 0.5), "arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 3},
        )


def _spread(heights: Sequence[float], gap: float, highest: float) -> list[float]:
    """The heights, in rising order, moved as little as it takes for no two to be nearer than `gap`, from the highest down."""
    levels: list[float] = []
    for height in heights:
        levels.append(max(height, levels[-1] + gap) if levels else height)
    for i in reversed(range(len(levels))):
        levels[i] = min(levels[i], highest if i == len(levels) - 1 else levels[i + 1] - gap)
    return levels


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


def _title_with_others(title: str, others: Sequence[Any]) -> str:
    return f"{title} (gray: {len(others)} others)" if others else title


def plot_pareto(groups: Sequence[Group], quality: Quality, series: Sequence[_Series], path: Path, cost: str) -> None:
    """Quality against a cost: squares for greedy rules, circles for lookahead, the Pareto front as a broad line."""
    others = _others(groups, [group for line in series for group in line.groups])
    title = _title_with_others("Quality against compute, ± one standard error; broad line: the best at no more cost", others)
    figure, axes = _canvas(title, f"{title_of(cost)} per image", title_of(quality.name))

    def points(members: Sequence[Group]) -> Curve:
        return [group.value(cost) for group in members], [_scaled(group, quality.name) for group in members]

    axes.plot(*points(pareto_front(groups, quality, [cost])), color="0.92", linewidth=9, zorder=0)
    axes.plot(*points(others), color=_GRAY, marker=".", linestyle="none", zorder=1)
    ends = []
    for line in series:
        for members in line.strands(cost):
            axes.errorbar(*points(members), _scaled_errors(members, quality.name), markersize=5, linewidth=1.2, **line.style)
        last = max(line.groups, key=lambda group: group.value(cost))
        ends.append((last.value(cost), _scaled(last, quality.name), line.label, line.style["color"]))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    _name_lines(axes, ends)
    _save(figure, path)


def plot_variety(groups: Sequence[Group], path: Path) -> None:
    """Right against distinct answers to one text task; a line joins samplers that differ only in their token temperature."""
    families: dict[tuple[str, int], list[Group]] = {}
    for group in groups:
        sampler = re.sub(r"(?<=[:,])token_temperature=[^,]+,?", "", group["sampler"]).rstrip(",:")
        families.setdefault((sampler, group["tokens_per_step"]), []).append(group)
    lines = [sorted(members, key=lambda group: group.value("distinct")) for members in families.values()]
    several = len({per_step for _, per_step in families}) > 1
    figure, axes = _canvas(f"{groups[0]['task'].capitalize()}, ± one standard error", "distinct answers (%)", "right (%)")
    ends = []
    styles = _styles([members[0] for members in lines])
    for (sampler, per_step), members, style in zip(families, lines, styles, strict=True):
        x, y = ([_scaled(group, name) for group in members] for name in ("distinct", "right"))
        axes.errorbar(x, y, _scaled_errors(members, "right"), markersize=5, linewidth=1.2, **style)
        name = describe_sampler(sampler)
        ends.append((x[-1], y[-1], f"{name}, {per_step} a step" if several else name, style["color"]))
    _name_lines(axes, ends)
    _save(figure, path)


def _plot_curves(
    axes: Any,
    groups: Sequence[Group],
    named: Sequence[tuple[Group, _Series]],
    curve: Callable[[Group], Curve],
    suffix: Callable[[Group], str] = lambda group: "",
) -> None:
    """A curve for every group, gray unless it is named; names end with the number of candidates and a suffix."""
    for group in _others(groups, [group for group, _ in named]):
        axes.plot(*curve(group), color=_GRAY, linewidth=0.8, zorder=1)
    ends = []
    for group, line in named:
        x, y = curve(group)
        if x:
            axes.plot(x, y, markersize=4, linewidth=1.2, **line.style)
            candidates = "" if group["num_candidates"] is None else f", N = {group['num_candidates']}"
            ends.append((x[-1], y[-1], describe_sampler(group["sampler"]) + candidates + suffix(group), line.style["color"]))
    _name_lines(axes, ends)


def plot_trajectories(groups: Sequence[Group], series: Sequence[_Series], path: Path, steps: int) -> None:
    """Cumulative entropy along the decoding, of the configurations with this number of steps."""
    shown = [group for group in groups if group["steps"] == steps]
    named = _representatives(shown, series)
    others = _others(shown, [group for group, _ in named])
    figure, axes = _canvas(_title_with_others(f"Cumulative entropy along {steps} steps", others), "step", "nats")
    _plot_curves(axes, shown, named, _entropy_by_step)
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

    for line in series:
        axes.plot(*points(line.groups), label=line.label, markersize=6, **{**line.style, "linestyle": "none"})
    others = _others(groups, [group for line in series for group in line.groups])
    if others:
        label = f"{len(others)} other configurations"
        axes.plot(*points(others), color=_GRAY, marker=".", markersize=9, linestyle="none", label=label, zorder=1)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_winners(groups: Sequence[Group], series: Sequence[_Series], path: Path) -> None:
    """The share of decisions that a candidate other than the first won, over the steps, with what chance would give."""
    shown = [group for group in groups if group.looks_ahead]
    named = _representatives(shown, series)
    others = _others(shown, [group for group, _ in named])
    title = _title_with_others("Decisions that another candidate than the first one won", others)
    figure, axes = _canvas(title, "share of the steps done", "%")
    for num in sorted({group["num_candidates"] for group in shown if group["num_candidates"]}):
        chance = 100 * (1 - 1 / num)
        axes.axhline(chance, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        axes.annotate(f"chance, N = {num}", (0, chance), xytext=(2, 2), textcoords="offset points", fontsize=8, color="0.3")
    axes.set_ylim(0, 102)
    _plot_curves(axes, shown, named, _other_winners, lambda group: f", {group['steps']} steps")
    _save(figure, path)


def _other_winners(group: Group) -> Curve:
    decisions, others = (
        [sum(values) for values in zip(*(record[name] for record in group.records), strict=False)]
        for name in ("decisions_by_step", "other_winner_by_step")
    )
    # Late steps that few images reach would be noise.
    counted = [(i, n, other) for i, (n, other) in enumerate(zip(decisions, others, strict=True)) if n > max(decisions) / 20]
    return [i / max(1, len(decisions) - 1) for i, _, _ in counted], [100 * other / n for _, n, other in counted]


def write_plots(groups: Sequence[Group], quality: Quality, folder: Path) -> list[Path]:
    """All plots of a comparison on images, with the same samplers in the same colors; returns their files."""
    series = choose_series(groups, quality)
    paths = [folder / name for name in ("pareto_rows.png", "pareto_calls.png", "quality_entropy.png", "winners.png")]
    plot_pareto(groups, quality, series, paths[0], "num_evaluations")
    plot_pareto(groups, quality, series, paths[1], "sequential_passes")
    plot_quality_entropy(groups, quality, series, paths[2])
    plot_winners(groups, series, paths[3])
    for steps in sorted({group["steps"] for group in groups}):
        paths.append(folder / f"entropy_{steps}_steps.png")
        plot_trajectories(groups, series, paths[-1], steps)
    return paths
