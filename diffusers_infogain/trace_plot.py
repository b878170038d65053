"""How one sample was decoded, as a figure of matplotlib."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from .extras import missing
from .trace_text import NEWLINE, ink_on, visible
from .trace_view import SampleTrace, Word

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_MAPS = 8
"""The most maps of entropies."""
_MOST_BOUNDARIES = 64
"""Steps, up to which the colors of neighbours can be told apart."""
_INK, _MUTED, _KNOWN, _GRID = "#222226", "#66666c", "#d4d4d8", "#e6e6ea"
_BLUE, _ORANGE = "#1f5a99", "#d95f02"


def _figure(width: float, height: float) -> Any:
    """A figure that does not touch pyplot, and that notebooks show even where pyplot was never loaded."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing("Plots need", "matplotlib", "eval", "matplotlib") from error

    class TraceFigure(Figure):
        """A figure that shows itself."""

        def _repr_png_(self) -> bytes:
            return as_png(self)

    return TraceFigure(figsize=(width, height), layout="constrained", facecolor="white")


def as_png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def plot_image(sample: SampleTrace, image: PIL.Image.Image | None) -> Any:
    """The figure of an image, or of any tokens on a grid; see `DecodingTrace.plot`.

    Args:
        image: The picture itself, if there is one to show.
    """
    heights = [3.4] + ([1.7] if sample.entropies is not None else []) + [3.0]
    figure = _figure(11, sum(heights) + 0.5)
    rows = iter(figure.subfigures(len(heights), 1, height_ratios=heights))
    figure.suptitle(sample.took, fontsize=13, color=_INK)
    top = next(rows).subplots(1, 2 if image is not None else 1, squeeze=False)[0]
    if image is not None:
        top[0].imshow(image, interpolation="nearest" if max(image.size) <= 256 else None)
        top[0].set_axis_off()
        top[0].set_title("The image", fontsize=11, color=_INK)
    _draw_order(top[-1], sample)
    if sample.entropies is not None:
        _draw_entropies(next(rows), sample)
    _draw_steps(next(rows), sample)
    return figure


def plot_text(sample: SampleTrace, words: Sequence[Word]) -> Any:
    """The figure of a text; see `DecodingTrace.plot`."""
    texts = [visible(word.text) for word in words]
    columns = min(max(sum(map(_width, texts)), _FEWEST), _COLUMNS)
    lines = _lines(texts, columns)
    height = max(0.24 * _COLUMNS / columns * len(lines) + 0.5, 1.1)
    figure = _figure(11, 2 * height + 3.5)
    by_step, by_entropy, below = figure.subfigures(3, 1, height_ratios=[height, height, 3.0])
    figure.suptitle(sample.took, fontsize=13, color=_INK)
    colors, norm = _step_colors(sample.num_steps)
    steps = [None if word.step < 0 else word.step + 1.0 for word in words]
    bar = _draw_words(by_step, words, lines, columns, steps, colors, norm, "Order of decoding (known tokens in grey)")
    bar.set_label("step")
    bar.set_ticks(_some(sample.num_steps, 8 if height > 1.5 else 4))
    bar.ax.minorticks_off()
    entropies = [word.entropy for word in words]
    colors, norm = _entropy_colors(max((value for value in entropies if value is not None), default=0))
    _draw_words(by_entropy, words, lines, columns, entropies, colors, norm, "Its entropy before that step").set_label("nats")
    _draw_steps(below, sample)
    return figure


_FEWEST, _COLUMNS = 48, 96
"""Characters in a line of text: fewer, and so larger ones, if the text is short."""


def _width(text: str) -> int:
    """Columns of a token, in a font whose characters are one column wide, or two for East Asian ones."""
    return max(sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text), 1)


def _lines(texts: Sequence[str], columns: int = _COLUMNS) -> list[list[tuple[int, int, int]]]:
    """Lines of (token, first column, its columns)."""
    lines: list[list[tuple[int, int, int]]] = [[]]
    column = 0
    for number, text in enumerate(texts):
        width = _width(text)
        if column and column + width > columns:
            lines.append([])
            column = 0
        lines[-1].append((number, column, width))
        column += width
        if text.endswith(NEWLINE):
            lines.append([])
            column = 0
    return [line for line in lines if line]


def _draw_words(
    figure: Any,
    words: Sequence[Word],
    lines: Sequence[Sequence[tuple[int, int, int]]],
    columns: int,
    values: Sequence[float | None],
    colors: Colormap,
    norm: Any,
    title: str,
) -> Any:
    """Tokens on boxes in the color of their value; returns the colorbar."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    font = get_font(findfont("DejaVu Sans Mono"))
    for row, line in enumerate(lines):
        for number, column, width in line:
            value = values[number]
            color = matplotlib.colors.to_rgb(_KNOWN) if value is None else colors(norm(value))[:3]
            axes.add_patch(Rectangle((column + 0.04, row + 0.06), width - 0.08, 0.88, facecolor=color, linewidth=0))
            text = "".join(c if font.get_char_index(ord(c)) else "□" for c in visible(words[number].text))
            axes.text(
                column + width / 2, row + 0.52, text, color=ink_on(color), ha="center", va="center", parse_math=False,
                fontfamily="DejaVu Sans Mono", fontsize=10.5 * _COLUMNS / columns, in_layout=False,
            )  # fmt: skip
    axes.set_xlim(0, columns)
    axes.set_ylim(max(len(lines), 1.5), 0)
    axes.set_axis_off()
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    return figure.colorbar(ScalarMappable(norm, colors), ax=axes, aspect=8, pad=0.01, fraction=0.03)


def _step_colors(num_steps: int) -> tuple[Colormap, Any]:
    """A color for each step, dark to light, which can be told apart in grey and by the color-blind."""
    import matplotlib
    from matplotlib.colors import BoundaryNorm, Normalize

    colors = matplotlib.colormaps["viridis"]
    if num_steps > _MOST_BOUNDARIES:
        return colors, Normalize(1, num_steps)
    return colors, BoundaryNorm(np.arange(num_steps + 1) + 0.5, colors.N)


def _entropy_colors(top: float) -> tuple[Colormap, Any]:
    """Colors of entropies from 0 to `top` nats."""
    import matplotlib
    from matplotlib.colors import Normalize

    return matplotlib.colormaps["magma"], Normalize(0, max(top, 1e-3))


def _draw_order(axes: Axes, sample: SampleTrace) -> None:
    """A map of the step that decoded each token; known ones are hatched."""
    colors, norm = _step_colors(sample.num_steps)
    steps = np.array(sample.decoded_at).reshape(sample.grid) + 1
    _draw_known(axes, steps == 0)
    mapped = axes.imshow(np.ma.masked_equal(steps, 0), cmap=colors, norm=norm, interpolation="nearest", zorder=1)
    known = " (known tokens hatched)" if (steps == 0).any() else ""
    axes.set_title(f"Order of decoding{known}", fontsize=11, color=_INK)
    axes.set_xticks([])
    axes.set_yticks([])
    bar = axes.figure.colorbar(mapped, ax=axes, ticks=_some(sample.num_steps, 8), shrink=0.9, aspect=16)
    bar.set_label("step")
    bar.ax.minorticks_off()


def _draw_known(axes: Axes, known: np.ndarray) -> None:
    """Hatched grey under the cells that were known."""
    if known.any():
        rows, columns = known.shape
        hatched: Any = {"facecolor": _KNOWN, "edgecolor": "#a0a0a6", "hatch": "////", "linewidth": 0, "zorder": 0}
        axes.fill([-0.5, columns - 0.5, columns - 0.5, -0.5], [-0.5, -0.5, rows - 0.5, rows - 0.5], **hatched)


def _some(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 1 to `count`, evenly spaced, with the first and the last one."""
    return sorted({round(number) for number in np.linspace(1, count, min(count, most))})


def _draw_entropies(figure: Any, sample: SampleTrace) -> None:
    """Maps of the entropies before some of the steps, on one scale."""
    assert sample.entropies is not None
    chosen = _some(sample.num_steps, _MAPS)
    values = sample.entropies.numpy()
    colors, norm = _entropy_colors(float(np.nanmax(values)))
    every = figure.subplots(1, _MAPS if sample.grid[1] <= 4 * sample.grid[0] else len(chosen), squeeze=False)[0]
    for axes in every:
        axes.set_axis_off()
    for axes, step in zip(every, chosen, strict=False):
        axes.imshow(np.full((*sample.grid, 3), 0.92), interpolation="nearest")
        shown = values[step - 1].reshape(sample.grid)
        mapped = axes.imshow(np.ma.masked_invalid(shown), cmap=colors, norm=norm, interpolation="nearest")
        axes.set_title(f"step {step}", fontsize=9, color=_MUTED)
    bar = figure.colorbar(mapped, ax=every[: len(chosen)], aspect=12, pad=0.01)
    bar.set_label("nats")
    figure.suptitle("Entropy of what was still masked before the step (decoded tokens in grey)", fontsize=11, color=_INK)


def _draw_steps(figure: Any, sample: SampleTrace) -> None:
    """What every step cost and gained, and which candidate it took, or how many tokens it decoded."""
    steps, compared = np.arange(1, sample.num_steps + 1), np.array(sample.num_compared) > 0
    left, right = figure.subfigures(1, 2)
    size = 5 if sample.num_steps <= 24 else 2.5
    cost, *gain = left.subplots(1 + bool(compared.any()), 1, sharex=True, squeeze=False)[:, 0]
    cost.plot(steps, sample.cost, color=_BLUE, marker="o", markersize=size, linewidth=1.2)
    _dress(cost, sample, "Cost of the step: entropy of the tokens it decoded", "nats")
    for axes in gain:
        known = np.array([np.nan if value is None else value for value in sample.gain])
        axes.axhline(0, color=_MUTED, linewidth=0.8)
        axes.plot(steps[compared], known[compared], color=_ORANGE, marker="D", markersize=size, linestyle="")
        _dress(axes, sample, "Its information gain, where candidates were compared", "nats")
        cost.set_xlabel("")
    axes = right.subplots()
    if sample.num_candidates == 1:
        axes.bar(steps, sample.num_decoded, color=_BLUE, width=0.8)
        _dress(axes, sample, "Tokens that the step decoded", "tokens")
    else:
        _draw_candidates(axes, sample, steps)


def _draw_candidates(axes: Axes, sample: SampleTrace, steps: np.ndarray) -> None:
    """Which candidate every step took. A lazy lookahead only chooses where it passed some over, so these are drawn there."""
    compared, winner = np.array(sample.num_compared), np.array(sample.winner)
    height = np.maximum(compared - 1, 0) if sample.lazy else winner
    kinds: list[tuple[str, Any, Any]] = [
        ("took the greedy one", (compared > 0) & (winner == 0), {"color": _BLUE, "marker": "o"}),
        ("took another one", (compared > 0) & (winner > 0), {"color": _ORANGE, "marker": "D"}),
        ("compared nothing", compared == 0, {"color": _MUTED, "marker": "o", "markerfacecolor": "white"}),
    ]
    size = 6 if sample.num_steps <= 32 else 4
    for label, where, style in kinds:
        if where.any():
            axes.vlines(steps[where], 0, height[where], color=style["color"], linewidth=1.5)
            axes.plot(steps[where], height[where], linestyle="", markersize=size, label=label, clip_on=False, zorder=3, **style)
    if sample.lazy:
        _dress(axes, sample, "Candidates passed over before one was good enough", "candidates")
    else:
        _dress(axes, sample, f"Which of {sample.num_candidates} candidates was taken (0: the greedy one)", "number")
    axes.set_ylim(0, max(sample.num_candidates - 1, 1) * 1.3)
    axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper left", handletextpad=0.1, columnspacing=0.8)


def _dress(axes: Axes, sample: SampleTrace, title: str, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_xlim(0.5, sample.num_steps + 0.5)
    axes.set_ylim(bottom=min(axes.get_ylim()[0], 0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))
    if unit != "nats":
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_MUTED)
