"""Tables and plots of comparisons and runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..choices import PRESETS
from ..extras import missing
from ..files import replacing
from .comparison import (
    Group,
    Quality,
    best_greedy,
    choose_quality,
    difference,
    pareto_front,
    parse_sampler,
    quality_entropy_correlation,
)
from .names import color_of, describe_sampler
from .statistics import Correlation, Figure
from .text_comparison import TextGroup

_COLUMNS = {
    "cumulative_entropy": "cumulative entropy (nats)",
    "model_rows": "model rows",
    "model_calls": "model calls in sequence",
    "seconds_per_image": "s per image",
    "peak_memory": "peak memory (MB)",
}
_SCALE = {"product_first": 100, "distinct": 100, "distinct_right": 100, "right": 100, "peak_memory": 1e-6}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_figure(figure: Figure | None, name: str = "") -> str:
    """Value and standard error to as many digits as the error warrants; shares of right images in percent."""
    if figure is None or math.isnan(figure.value):
        return "–"
    scale = _SCALE.get(name, 1)
    value, error = figure.value * scale, figure.standard_error * scale
    if math.isnan(error) or error == 0:
        return f"{value:.0f}" if name == "peak_memory" else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    digits = max(0, min(4, 1 - math.floor(math.log10(error)))) if error < 10 else 0
    digits = min(digits, 1) if name == "right" else digits
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def comparison_table(groups: Sequence[Group], quality: Quality) -> str:
    """All configurations; those that look ahead beside the best greedy rule at equal model calls and at equal model rows."""
    names = [name for group in groups for name in group.figures]
    others = [name for name in dict.fromkeys(names) if name not in (quality.name, *_COLUMNS)]
    columns = [quality.name, *(name for name in _COLUMNS if name in names and name != quality.name), *others]
    paired = quality.name == "right"
    header = ["steps", "sampler", "guidance", *(_title(name) for name in columns)]
    header += ["points above the best greedy rule at equal model calls", "at equal model rows"] if paired else []
    front, rows = pareto_front(groups, quality), []
    for group in sorted(groups, key=lambda g: (g.steps, g.figure("model_rows"), g.label)):
        cells = [format_figure(group.figures.get(name), name) for name in columns]
        if any(group is other for other in front):
            cells[0] = f"**{cells[0]}**"
        if paired:
            cells += [_advantage(groups, group, quality, equal) for equal in ("model_calls", "model_rows")]
        rows.append([str(group.steps), group.label, f"{group.guidance_scale:g}", *cells])
    return markdown_table(header, rows)


def _title(name: str) -> str:
    return "right (%)" if name == "right" else _COLUMNS.get(name, name)


def _advantage(groups: Sequence[Group], group: Group, quality: Quality, equal: str) -> str:
    rival = best_greedy(groups, group, quality, equal=equal) if group.looks_ahead else None
    gap = difference(group, rival) if rival is not None else None
    if gap is None or rival is None:
        return ""
    return f"{100 * gap.value:+.1f} ± {100 * gap.standard_error:.1f} ({rival.label}, {rival.steps} steps)"


def comparison_report(groups: Sequence[Group], quality: Quality, description: str) -> str:
    """The table with what it stands on."""
    r = quality_entropy_correlation(groups, quality)
    n = sorted({figure.n for group in groups if (figure := quality.of(group)) is not None})
    seeds = sorted({seed for group in groups for seed in group.seeds})
    lines = [
        comparison_table(groups, quality),
        "",
        f"{description} {' or '.join(map(str, n))} images per row, seeds {', '.join(map(str, seeds))}. ± is one standard error, "
        "over prompts for figures of single images and over seeds for the others; differences are paired by prompt and seed. "
        "Bold: on the Pareto front of quality against model rows.",
        "",
        f"{_title(quality.name).capitalize()} against cumulative entropy: {correlation_text(r)}.",
        "",
    ]
    return "\n".join(lines)


def correlation_text(r: Correlation) -> str:
    """Pearson's r with its interval and n, for tables and pictures alike."""
    if math.isnan(r.r):
        return f"no correlation can be told from {r.n} configurations"
    interval = f" (95 % interval {r.low:.2f} to {r.high:.2f})" if not math.isnan(r.low) else ""
    return f"Pearson's r = {r.r:.2f}{interval} over {r.n} configurations"


def figures_table(figures: Mapping[str, Figure]) -> str:
    """Figures of one set of images, one per line."""
    rows = [[_title(name), format_figure(figure, name), str(figure.n)] for name, figure in figures.items()]
    return markdown_table(["figure", "value", "images"], rows)


def composition_table(report: Mapping[str, Figure]) -> str:
    """GenEval's categories with the share of right images in percent."""
    rows = [[name, format_figure(figure, "right"), str(figure.n)] for name, figure in report.items()]
    return markdown_table(["category", "right (%)", "images"], rows)


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


MOST_SERIES = 6
"""Samplers that a picture names and gives a color to; more are gray, since nobody could tell them apart."""
_LINES_OF_ONE_COLOR = ("-", "--", ":", "-.")
_GRAY = "0.8"


@dataclass(frozen=True)
class _Series:
    """Groups that differ in steps, candidates and entropy bound only, with one name and one look for all pictures."""

    label: str
    groups: list[Group]
    style: dict[str, Any]

    def strands(self, cost: str) -> list[list[Group]]:
        """Groups that differ in one thing only, so that a line may join them: in the bound where there is one, else in steps."""
        strands: dict[tuple[int | None, int | None], list[Group]] = {}
        for group in sorted(self.groups, key=lambda group: group.figure(cost)):
            bounded = re.search(r"entropy_bound=(?!0(,|$))", group.sampler)
            strands.setdefault((group.num_candidates, group.steps if bounded else None), []).append(group)
        return list(strands.values())


def choose_series(groups: Sequence[Group], quality: Quality, names: Sequence[str] = ()) -> list[_Series]:
    """The samplers that pictures name: the presets, then those on a Pareto front, then those that most was tried of.

    Args:
        names: Takes these in place of them, by their names in pictures (see `describe_sampler`).

    Raises:
        ValueError: If none of the groups has one of these names.
    """
    several = len({group.guidance_scale for group in groups}) > 1
    usual = max((group.guidance_scale for group in groups), key=[g.guidance_scale for g in groups].count)
    families: dict[str, list[Group]] = {}
    for group in groups:
        guidance = f", guidance {group.guidance_scale:g}" if several and group.guidance_scale != usual else ""
        families.setdefault(describe_sampler(group.sampler, bounds=False) + guidance, []).append(group)
    fronts = [group for cost in ("model_rows", "model_calls") for group in pareto_front(groups, quality, cost)]

    def interest(members: list[Group]) -> tuple[bool, int, int]:
        on_fronts = sum(any(group is other for other in fronts) for group in members)
        return members[0].sampler in PRESETS and members[0].guidance_scale == usual, on_fronts, len(members)

    unknown = [name for name in names if name not in families]
    if unknown:
        raise ValueError(f"`names` must be among {'; '.join(sorted(families))}, got {unknown[0]!r}.")
    by_interest = sorted(families, key=lambda label: (*(-value for value in interest(families[label])), label))
    series, seen = [], dict[str, int]()
    for label in names or by_interest[:MOST_SERIES]:
        members = families[label]
        color = color_of(members[0].sampler)
        line = _LINES_OF_ONE_COLOR[seen.get(color, 0) % len(_LINES_OF_ONE_COLOR)]
        seen[color] = seen.get(color, 0) + 1
        style = {"color": color, "linestyle": line, "marker": "o" if members[0].looks_ahead else "s"}
        series.append(_Series(label, members, style | ({} if line == "-" else {"markerfacecolor": "white"})))
    return series


def _others(groups: Sequence[Group], series: Sequence[_Series]) -> list[Group]:
    shown = {id(group) for one in series for group in one.groups}
    return [group for group in groups if id(group) not in shown]


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
    """Of every series and number of candidates the group with most steps, as many as a picture can name."""
    chosen = []
    for one in series:
        own = [group for group in one.groups if any(group is other for other in groups)]
        most_steps = {group.num_candidates: group for group in sorted(own, key=lambda group: group.steps)}
        by_candidates = sorted(most_steps.values(), key=lambda group: -(group.num_candidates or 0))
        chosen += [(rank, group, one) for rank, group in enumerate(by_candidates)]
    chosen.sort(key=lambda item: item[0])
    return [(group, one) for _, group, one in chosen[:MOST_SERIES]]


def _title_with_others(title: str, others: Sequence[Any]) -> str:
    return f"{title} (gray: {len(others)} others)" if others else title


def plot_pareto(
    groups: Sequence[Group], quality: Quality, path: Path, cost: str = "model_rows", series: Sequence[_Series] | None = None
) -> None:
    """Quality against a cost: squares for greedy rules, circles for lookahead, the Pareto front as a broad line."""
    series = choose_series(groups, quality) if series is None else series
    others, scale = _others(groups, series), _SCALE.get(quality.name, 1)
    title = _title_with_others("Quality against compute, ± one standard error; broad line: the best at no more cost", others)
    figure, axes = _canvas(title, f"{_title(cost)} per image", _title(quality.name))

    def points(members: Sequence[Group]) -> tuple[list[float], list[float]]:
        return [group.figure(cost) for group in members], [scale * group.figure(quality.name) for group in members]

    axes.plot(*points(pareto_front(groups, quality, cost)), color="0.92", linewidth=9, zorder=0)
    axes.plot(*points(others), color=_GRAY, marker=".", linestyle="none", zorder=1)
    ends = []
    for one in series:
        for members in one.strands(cost):
            error = [0 if math.isnan(e := group.figures[quality.name].standard_error) else scale * e for group in members]
            x, y = points(members)
            axes.errorbar(x, y, error, markersize=5, linewidth=1.2, **one.style)
        last = max(one.groups, key=lambda group: group.figure(cost))
        ends.append((*(values[0] for values in points([last])), one.label, one.style["color"]))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    _name_lines(axes, ends)
    _save(figure, path)


def plot_variety(groups: Sequence[TextGroup], path: Path) -> None:
    """Right against distinct answers to one task; samplers that differ in their token temperature alone are joined by a line."""
    families: dict[tuple[str, int], list[TextGroup]] = {}
    for group in groups:
        sampler = re.sub(r"(?<=[:,])token_temperature=[^,]+,?", "", group.sampler).rstrip(",:")
        families.setdefault((sampler, group.tokens_per_step), []).append(group)
    figure, axes = _canvas(f"{groups[0].task.capitalize()}, ± one standard error", "distinct answers (%)", "right (%)")
    several = len({group.tokens_per_step for group in groups}) > 1
    ends, seen = [], dict[str, int]()
    for (sampler, per_step), members in families.items():
        members = sorted(members, key=lambda group: group.figures["distinct"].value)
        x = [100 * group.figures["distinct"].value for group in members]
        y = [100 * group.figures["right"].value for group in members]
        error = [100 * group.figures["right"].standard_error for group in members]
        color = color_of(members[0].sampler)
        line = _LINES_OF_ONE_COLOR[seen.get(color, 0) % len(_LINES_OF_ONE_COLOR)]
        seen[color] = seen.get(color, 0) + 1
        marker = "o" if parse_sampler(members[0].sampler).looks_ahead else "s"
        axes.errorbar(x, y, error, color=color, linestyle=line, marker=marker, markersize=5, linewidth=1.2)
        name = describe_sampler(sampler)
        ends.append((x[-1], y[-1], f"{name}, {per_step} a step" if several else name, color))
    _name_lines(axes, ends)
    _save(figure, path)


def plot_trajectories(
    groups: Sequence[Group], path: Path, steps: int, series: Sequence[_Series] | None = None, quality: Quality | None = None
) -> None:
    """Cumulative entropy along the decoding, for the configurations with this number of steps."""
    series = choose_series(groups, quality or choose_quality(groups)) if series is None else series
    shown = [group for group in groups if group.steps == steps]
    named = _representatives(shown, series)
    others = [group for group in shown if not any(group is other for other, _ in named)]
    figure, axes = _canvas(_title_with_others(f"Cumulative entropy along {steps} steps", others), "step", "nats")
    for group in others:
        axes.plot(*_entropy_by_step(group), color=_GRAY, linewidth=0.8, zorder=1)
    ends = []
    for group, one in named:
        x, y = _entropy_by_step(group)
        axes.plot(x, y, markersize=4, linewidth=1.2, **one.style)
        ends.append((x[-1], y[-1], _with_candidates(describe_sampler(group.sampler), group), one.style["color"]))
    _name_lines(axes, ends)
    _save(figure, path)


def _entropy_by_step(group: Group) -> tuple[list[int], list[float]]:
    runs = [result["entropy_by_step"] for result in group.results]
    mean = [sum(values) / len(values) for values in zip(*runs, strict=False)]
    return list(range(1, len(mean) + 1)), mean


def _with_candidates(name: str, group: Group) -> str:
    return name if group.num_candidates is None else f"{name}, N = {group.num_candidates}"


def plot_quality_entropy(groups: Sequence[Group], quality: Quality, path: Path, series: Sequence[_Series] | None = None) -> None:
    """Quality against cumulative entropy, one point per configuration, with Pearson's r."""
    series = choose_series(groups, quality) if series is None else series
    scale = _SCALE.get(quality.name, 1)
    title = correlation_text(quality_entropy_correlation(groups, quality))
    title = title[0].upper() + title[1:]
    figure, axes = _canvas(title, "cumulative entropy (nats)", _title(quality.name))

    def points(members: Sequence[Group]) -> tuple[list[float], list[float]]:
        return [group.figure("cumulative_entropy") for group in members], [
            scale * group.figure(quality.name) for group in members
        ]

    for one in series:
        axes.plot(*points(one.groups), label=one.label, markersize=6, **{**one.style, "linestyle": "none"})
    others = _others(groups, series)
    if others:
        label = f"{len(others)} other configurations"
        axes.plot(*points(others), color=_GRAY, marker=".", markersize=9, linestyle="none", label=label, zorder=1)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_winners(
    groups: Sequence[Group], path: Path, series: Sequence[_Series] | None = None, quality: Quality | None = None
) -> None:
    """In what share of the decisions a candidate other than the first won, over the steps, and what chance would give."""
    shown = [group for group in groups if group.looks_ahead]
    if series is None:
        series = choose_series(groups, quality or choose_quality(groups))
    named = _representatives(shown, series)
    others = [group for group in shown if not any(group is other for other, _ in named)]
    title = _title_with_others("Decisions that another candidate than the first one won", others)
    figure, axes = _canvas(title, "share of the steps done", "%")
    for num in sorted({group.num_candidates for group in shown if group.num_candidates}):
        chance = 100 * (1 - 1 / num)
        axes.axhline(chance, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        axes.annotate(f"chance, N = {num}", (0, chance), xytext=(2, 2), textcoords="offset points", fontsize=8, color="0.3")
    for group in others:
        axes.plot(*_other_winners(group), color=_GRAY, linewidth=0.8, zorder=1)
    ends = []
    for group, one in named:
        x, y = _other_winners(group)
        if x:
            axes.plot(x, y, markersize=4, linewidth=1.2, **one.style)
            name = _with_candidates(describe_sampler(group.sampler), group)
            ends.append((x[-1], y[-1], f"{name}, {group.steps} steps", one.style["color"]))
    axes.set_ylim(0, 102)
    _name_lines(axes, ends)
    _save(figure, path)


def _other_winners(group: Group) -> tuple[list[float], list[float]]:
    decisions, others = ([sum(values) for values in zip(*(r[key] for r in group.results), strict=False)] for key in _DECISIONS)
    # Late steps, which few samples get to, tell nothing.
    counted = [(i, n, other) for i, (n, other) in enumerate(zip(decisions, others, strict=True)) if n > max(decisions) / 20]
    return [i / max(1, len(decisions) - 1) for i, _, _ in counted], [100 * other / n for _, n, other in counted]


_DECISIONS = ("decisions_by_step", "other_winner_by_step")


def write_plots(groups: Sequence[Group], quality: Quality, folder: Path) -> list[Path]:
    """All plots of a comparison, with the same samplers in the same colors; returns their files."""
    series = choose_series(groups, quality)
    paths = [folder / name for name in ("pareto_rows.png", "pareto_calls.png", "quality_entropy.png", "winners.png")]
    plot_pareto(groups, quality, paths[0], "model_rows", series)
    plot_pareto(groups, quality, paths[1], "model_calls", series)
    plot_quality_entropy(groups, quality, paths[2], series)
    plot_winners(groups, paths[3], series)
    for steps in sorted({group.steps for group in groups}):
        paths.append(folder / f"entropy_{steps}_steps.png")
        plot_trajectories(groups, paths[-1], steps, series)
    return paths
