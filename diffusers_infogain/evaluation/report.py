"""Tables and plots of comparisons and runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .comparison import Group, Quality, best_greedy, difference, pareto_front, parse_sampler, quality_entropy_correlation
from .statistics import Figure
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
        f"Pearson's r between {_title(quality.name)} and cumulative entropy over the {r.n} configurations: {r.r:.2f}"
        + (f" (95 % interval {r.low:.2f} to {r.high:.2f})." if not math.isnan(r.low) else "."),
        "",
    ]
    return "\n".join(lines)


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
        raise ModuleNotFoundError("Plots need matplotlib: pip install 'diffusers_infogain[eval]'.", name="matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _families(groups: Sequence[Group], cost: str = "model_rows") -> dict[str, list[Group]]:
    """Groups that differ in steps, candidates and entropy bound only, by what they cost, with a name for all of them."""
    several = len({group.guidance_scale for group in groups}) > 1
    families: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda g: g.figure(cost)):
        name = re.sub(r"entropy_bound=(?!0(,|$))[^,]+", "entropy_bound", group.sampler)
        families.setdefault(name + (f", guidance {group.guidance_scale:g}" if several else ""), []).append(group)
    return families


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


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


def _style(looks_ahead: bool, index: int) -> dict[str, Any]:
    colors = load_pyplot().get_cmap("tab20").colors
    return {"color": colors[index % 20], "marker": "o" if looks_ahead else "s", "linestyle": "-" if looks_ahead else "--"}


def plot_pareto(groups: Sequence[Group], quality: Quality, path: Path, cost: str = "model_rows") -> None:
    """Quality against a cost: squares and dashes for greedy rules, circles for lookahead, the Pareto front in grey."""
    scale = _SCALE.get(quality.name, 1)
    figure, axes = _canvas("Quality against compute", f"{_title(cost)} per image", _title(quality.name))
    front = pareto_front(groups, quality, cost)
    x, y = ([factor * g.figure(name) for g in front] for name, factor in ((cost, 1), (quality.name, scale)))
    axes.plot(x, y, color="0.85", linewidth=6, zorder=0)
    for index, (label, members) in enumerate(_families(groups, cost).items()):
        x, y = ([factor * g.figure(name) for g in members] for name, factor in ((cost, 1), (quality.name, scale)))
        error = [0 if math.isnan(e := group.figures[quality.name].standard_error) else scale * e for group in members]
        axes.errorbar(x, y, error, label=label, markersize=5, linewidth=1, **_style(members[0].looks_ahead, index))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    _legend(axes)
    _save(figure, path)


def plot_variety(groups: Sequence[TextGroup], path: Path) -> None:
    """Right against distinct answers to one task; samplers that differ in their token temperature alone are joined by a line."""
    families: dict[tuple[str, int], list[TextGroup]] = {}
    for group in groups:
        label = re.sub(r"(?<=[:,])token_temperature=[^,]+,?", "", group.sampler).rstrip(",:")
        families.setdefault((label, group.tokens_per_step), []).append(group)
    figure, axes = _canvas(groups[0].task, "distinct answers (%)", "right (%)")
    several = len({group.tokens_per_step for group in groups}) > 1
    for index, ((label, per_step), members) in enumerate(families.items()):
        members = sorted(members, key=lambda group: group.figures["distinct"].value)
        x = [100 * group.figures["distinct"].value for group in members]
        y = [100 * group.figures["right"].value for group in members]
        error = [100 * group.figures["right"].standard_error for group in members]
        name = f"{label}, {per_step} a step" if several else label
        style = _style(parse_sampler(members[0].sampler).looks_ahead, index)
        axes.errorbar(x, y, error, label=name, markersize=5, linewidth=1, **style)
    figure.legend(fontsize=7, frameon=False, loc="outside lower left")  # names of samplers are long
    _save(figure, path)


def plot_trajectories(groups: Sequence[Group], path: Path, steps: int) -> None:
    """Cumulative entropy along the decoding, for the configurations with this number of steps."""
    figure, axes = _canvas(f"Cumulative entropy along {steps} steps", "step", "nats")
    shown = [group for group in groups if group.steps == steps]
    for index, group in enumerate(sorted(shown, key=lambda g: -g.figure("cumulative_entropy"))):
        runs = [result["entropy_by_step"] for result in group.results]
        mean = [sum(values) / len(values) for values in zip(*runs, strict=False)]
        label = (
            group.label if len({g.guidance_scale for g in shown}) == 1 else f"{group.label}, guidance {group.guidance_scale:g}"
        )
        axes.plot(range(1, len(mean) + 1), mean, label=label, markersize=4, **_style(group.looks_ahead, index))
    _legend(axes)
    _save(figure, path)


def plot_quality_entropy(groups: Sequence[Group], quality: Quality, path: Path) -> None:
    """Quality against cumulative entropy, one point per configuration, with Pearson's r."""
    r, scale = quality_entropy_correlation(groups, quality), _SCALE.get(quality.name, 1)
    interval = "" if math.isnan(r.low) else f" (95 % interval {r.low:.2f} to {r.high:.2f})"
    title = f"Pearson's r = {r.r:.2f}{interval} over {r.n} configurations"
    figure, axes = _canvas(title, "cumulative entropy (nats)", _title(quality.name))
    for index, (label, members) in enumerate(_families(groups).items()):
        x, y = ([factor * g.figure(n) for g in members] for n, factor in (("cumulative_entropy", 1), (quality.name, scale)))
        style = {**_style(members[0].looks_ahead, index), "linestyle": "none"}
        axes.plot(x, y, label=label, markersize=6, **style)
    _legend(axes)
    _save(figure, path)


def plot_winners(groups: Sequence[Group], path: Path) -> None:
    """In what share of the decisions a candidate other than the first, the greedy one, won, over the steps."""
    figure, axes = _canvas("Decisions that another candidate than the greedy one won", "share of the steps done", "%")
    shown = [group for group in groups if group.looks_ahead]
    for index, group in enumerate(shown):
        decisions, others = (
            [sum(values) for values in zip(*(r[key] for r in group.results), strict=False)] for key in _DECISIONS
        )
        # Late steps, which few samples get to, tell nothing.
        counted = [(i, n, other) for i, (n, other) in enumerate(zip(decisions, others, strict=True)) if n > max(decisions) / 20]
        points = [(i / max(1, len(decisions) - 1), 100 * other / n) for i, n, other in counted]
        label = f"{group.label}, {group.steps} steps"
        axes.plot(*zip(*points, strict=True), label=label, markersize=4, **_style(group.looks_ahead, index))
    axes.set_ylim(0, 102)
    if shown:
        _legend(axes)
    _save(figure, path)


_DECISIONS = ("decisions_by_step", "other_winner_by_step")


def write_plots(groups: Sequence[Group], quality: Quality, folder: Path) -> list[Path]:
    """All plots of a comparison; returns their files."""
    paths = [folder / name for name in ("pareto_rows.png", "pareto_calls.png", "quality_entropy.png", "winners.png")]
    plot_pareto(groups, quality, paths[0], "model_rows")
    plot_pareto(groups, quality, paths[1], "model_calls")
    plot_quality_entropy(groups, quality, paths[2])
    plot_winners(groups, paths[3])
    for steps in sorted({group.steps for group in groups}):
        paths.append(folder / f"entropy_{steps}_steps.png")
        plot_trajectories(groups, paths[-1], steps)
    return paths
