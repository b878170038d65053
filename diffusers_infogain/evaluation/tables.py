"""Tables of comparisons and runs, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .groups import (
    RIGHT,
    Group,
    Quality,
    best_greedy,
    difference,
    pareto_front,
    quality_entropy_correlation,
)
from .statistics import Correlation, Figure

_TITLES = {
    "right": "accuracy (%)",
    "cumulative_entropy": "cumulative entropy (nats)",
    "num_states": "states",
    "num_evaluations": "NFE",
    "sequential_passes": "sequential passes",
    "seconds_per_image": "s per image",
    "peak_memory": "peak memory (MB)",
    "distinct": "distinct (%)",
    "distinct_right": "distinct and right (%)",
    "product_first": "product first (%)",
    "seconds": "s each",
}
LIMITS = ("num_states", "num_evaluations", "sequential_passes", "seconds_per_image")
"""The costs at which samplers of images are compared with greedy rules."""
_FRONT = ("num_evaluations", "sequential_passes")
_IMAGE_COSTS = ("cumulative_entropy", *LIMITS, "peak_memory")
_TEXT_COLUMNS = (
    "right",
    "cumulative_entropy",
    "num_evaluations",
    "steps",
    "distinct",
    "distinct_right",
    "product_first",
    "seconds",
)
SCALE = {"right": 100, "distinct": 100, "distinct_right": 100, "product_first": 100, "peak_memory": 1e-6}
"""The factor by which tables and plots show a figure, where it is not 1: shares in percent, memory in megabytes."""


def title_of(figure: str) -> str:
    """The name of a figure with its unit, as tables and plots print it."""
    return _TITLES.get(figure, figure)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_figure(figure: Figure | None, name: str = "") -> str:
    """Value and standard error, scaled as `SCALE` has it, with as many digits as the error warrants; a dash for no figure."""
    if figure is None or math.isnan(figure.value):
        return "–"
    scale = SCALE.get(name, 1)
    value = figure.value * scale
    error = figure.standard_error * scale
    if math.isnan(error) or error == 0:
        return f"{value:.0f}" if name == "peak_memory" else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    digits = max(0, min(4, 1 - math.floor(math.log10(error)))) if error < 10 else 0
    digits = min(digits, 1) if name == "right" else digits
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def image_table(groups: Sequence[Group], quality: Quality, chosen: Sequence[Group] = ()) -> str:
    """All configurations on images, cheapest first for each number of steps.

    The Pareto front is bold. Where right images were counted, they are compared with the best greedy rule at equal cost.

    Args:
        chosen: The greedy rules that these compete with, measured on other prompts, by whose figures the best is chosen (see
            `best_greedy`). Without them nothing is compared.
    """
    known = list(dict.fromkeys(name for group in groups for name in group.figures))
    others = [name for name in known if name not in (quality.name, *_IMAGE_COSTS)]
    columns = [quality.name, *(name for name in _IMAGE_COSTS if name in known and name != quality.name), *others]
    limits = LIMITS if chosen and quality == RIGHT else ()
    header = ["steps", "sampler", "guidance", *map(title_of, columns)]
    header += [f"points above the best greedy rule at equal {title_of(limit)}" for limit in limits]
    front = pareto_front(groups, quality, _FRONT)
    rows = []
    for group in sorted(groups, key=lambda group: (group["steps"], group.value("num_evaluations"), group.label)):
        cells = [format_figure(group.figures.get(name), name) for name in columns]
        if any(group is other for other in front):
            cells[0] = f"**{cells[0]}**"
        cells += [advantage(group, chosen, groups, limit=limit) for limit in limits]
        rows.append([str(group["steps"]), group.label, f"{group['guidance_scale']:g}", *cells])
    return markdown_table(header, rows)


def advantage(
    group: Group, chosen: Sequence[Group], measured: Sequence[Group], *, same: Sequence[str] = (), limit: str | None = None
) -> str:
    """The percentage points by which a group is above the best greedy rule, and which that is, as `best_greedy` chooses it.

    A dash for the rule itself and where no rule is as cheap. A rule that was not measured on the present prompts is only named.
    """
    rival = best_greedy(group, chosen, measured, RIGHT, same=same, limit=limit)
    if rival is None or rival is group:
        return "–"
    words = [rival.label]
    words += [f"{rival['steps']} steps"] if rival.key.get("steps") != group.key.get("steps") else []
    scale = rival.key.get("guidance_scale")
    words += [f"guidance {scale:g}"] if scale != group.key.get("guidance_scale") else []
    name = ", ".join(words)
    gap = difference(group, rival) if any(rival is other for other in measured) else None
    return f"not measured here ({name})" if gap is None else f"{100 * gap.value:+.1f} ± {100 * gap.standard_error:.1f} ({name})"


def image_report(groups: Sequence[Group], quality: Quality, description: str, chosen: Sequence[Group] = ()) -> str:
    """The table of `image_table` with its sample sizes and seeds, and the correlation of quality and entropy."""
    sizes = sorted({group.figures[quality.name].n for group in groups if quality.name in group.figures})
    seeds = sorted({seed for group in groups for seed in group.seeds})
    correlation = quality_entropy_correlation(groups, quality)
    title = title_of(quality.name)
    entropy = f"{title[0].upper()}{title[1:]} against cumulative entropy: {correlation_text(correlation)}."
    paired = (
        " Differences are paired by prompt and seed; the greedy rules in brackets were chosen on other prompts." if chosen else ""
    )
    lines = [
        image_table(groups, quality, chosen),
        "",
        f"{description} {' or '.join(map(str, sizes))} images per row, seeds {', '.join(map(str, seeds))}. ± is one standard "
        f"error, over prompts for figures of single images and over seeds for the others.{paired} Bold: no other row is as good "
        "for no more NFE and no more sequential passes, and better in one of the three.",
        "",
        *((entropy, "") if quality.name != "cumulative_entropy" else ()),
    ]
    return "\n".join(lines)


def correlation_text(r: Correlation) -> str:
    """Pearson's r with its interval and n, for tables and plots alike."""
    if math.isnan(r.r):
        return f"no correlation can be told from {r.n} configurations"
    interval = f" (95 % interval {r.low:.2f} to {r.high:.2f})" if not math.isnan(r.low) else ""
    return f"Pearson's r = {r.r:.2f}{interval} over {r.n} configurations"


def text_tables(groups: Sequence[Group], chosen: Sequence[Group] = ()) -> str:
    """A table for each task, with most right answers first for each number of tokens per step, and the correlations of right
    answers with entropy.

    Args:
        chosen: Greedy rules measured on other problems or seeds, for a column of differences to the best of them.
    """
    parts = []
    for task in dict.fromkeys(group["task"] for group in groups):
        own = [group for group in groups if group["task"] == task]
        columns = [name for name in _TEXT_COLUMNS if any(name in group.figures for group in own)]
        header = ["tokens a step", "sampler", *map(title_of, columns)]
        header += ["points above the best greedy rule"] if chosen else []
        rows = []
        for group in sorted(own, key=lambda group: (group["tokens_per_step"], -group.value("right"))):
            cells = [format_figure(group.figures.get(name), name) for name in columns]
            cells += [advantage(group, chosen, own, same=("task", "tokens_per_step"))] if chosen else []
            rows.append([str(group["tokens_per_step"]), group.label, *cells])
        parts += [f"**{task}**", markdown_table(header, rows), _text_correlations(own)]
    return "\n\n".join(filter(None, parts))


def _text_correlations(groups: Sequence[Group]) -> str:
    lines = []
    for count in dict.fromkeys(group["tokens_per_step"] for group in groups):
        own = [group for group in groups if group["tokens_per_step"] == count]
        right, distinct = (quality_entropy_correlation(own, quality).r for quality in (RIGHT, Quality("distinct_right", True)))
        if not math.isnan(right) and not math.isnan(distinct):
            lines.append(f"- {count} a step, {len(own)} samplers: {right:.2f} with right, {distinct:.2f} with distinct and right")
    return "Pearson's r of cumulative entropy:\n\n" + "\n".join(lines) if lines else ""


def figures_table(figures: Mapping[str, Figure]) -> str:
    """The figures of one set of images, a line each."""
    return _figure_lines(("figure", "value", "images"), [(title_of(name), name, figure) for name, figure in figures.items()])


def composition_table(report: Mapping[str, Figure]) -> str:
    """The share of right images in each of GenEval's categories, in percent."""
    return _figure_lines(("category", title_of("right"), "images"), [(name, "right", figure) for name, figure in report.items()])


def _figure_lines(header: Sequence[str], figures: Sequence[tuple[str, str, Figure]]) -> str:
    return markdown_table(header, [[title, format_figure(figure, name), str(figure.n)] for title, name, figure in figures])
