"""Figures of traces: that they show the figures of the trace, and can be drawn for any number of steps, tokens and candidates."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from helpers.sampling import HashModel, generators, make_scheduler
from matplotlib.backends.backend_agg import FigureCanvasAgg

from diffusers_infogain import decode
from diffusers_infogain.trace_plot import _lines, _some

CODES = MASK = 6


def trace_of(length: int = 12, steps: int = 4, grid=(3, 4), known: int = 0, **config):
    tokens = torch.full((1, length), MASK)
    tokens[:, :known] = 2
    scheduler = make_scheduler(MASK, steps, **config)
    return decode(HashModel(length, CODES), scheduler, tokens, generator=generators(0), grid=grid).trace


def axes_of(figure, title: str):
    (axes,) = [axes for axes in figure.axes if title in axes.get_title() + axes.get_title(loc="left")]
    return axes


CASES = [
    {"length": 1, "grid": (1, 1), "steps": 1, "sampler": "confidence"},
    {"length": 16, "grid": (4, 4), "steps": 16, "num_candidates": 8},
    {"length": 64, "grid": (2, 32), "steps": 64, "num_candidates": 2, "lazy_threshold": -1.0},
    {"length": 64, "grid": (64, 1), "steps": 9, "sampler": "confidence"},
    {"length": 1024, "grid": (32, 32), "steps": 12, "sampler": "halton"},
    {"length": 30, "grid": (5, 6), "steps": 5, "known": 20, "sampler": "confidence"},
    {"length": 300, "grid": (15, 20), "steps": 300, "sampler": "confidence"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_is_drawn_without_warnings_and_inside_the_figure(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = trace_of(**case).plot()
        content = figure._repr_png_()
    assert content.startswith(b"\x89PNG")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, width, height = canvas.get_renderer(), figure.bbox.width, figure.bbox.height
    for axes in figure.axes:
        legend = axes.get_legend()
        for text in [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *([legend] if legend else [])]:
            box = text.get_window_extent(renderer)
            if box.width > 1:
                assert box.x0 >= -2, (text, box)
                assert box.x1 <= width + 2, (text, box)
                assert box.y0 >= -2, (text, box)
                assert box.y1 <= height + 2, (text, box)


def test_maps_show_the_order_and_the_entropies():
    trace = trace_of(known=5, sampler="confidence")
    figure, sample = trace.plot(), trace.of_sample()
    (order,) = axes_of(figure, "Order of decoding").images
    shown = order.get_array()
    assert shown.mask.sum() == 5
    assert (shown.filled(0) - 1).flatten().tolist() == sample.decoded_at
    for step in range(1, 5):
        entropies = axes_of(figure, f"step {step}").images[1]
        assert np.allclose(entropies.get_array().filled(-1), sample.entropies[step - 1].nan_to_num(-1).view(3, 4))
        assert entropies.get_clim() == (0, pytest.approx(float(sample.entropies.nan_to_num(0).max())))
    cost = axes_of(figure, "Cost").lines[0]
    assert cost.get_ydata().tolist() == sample.cost
    assert [bar.get_height() for bar in axes_of(figure, "Tokens that the step decoded").patches] == sample.num_decoded
    title = figure._suptitle.get_text()
    assert title == f"4 steps, 4 rows of the network (NFE), {sum(sample.cost):.1f} nats of cumulative entropy"


def points(axes) -> dict[str, list[tuple[int, int]]]:
    return {
        line.get_label(): list(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_candidates_are_drawn_as_the_sampler_chose():
    eager = trace_of(steps=8, num_candidates=4)
    sample, drawn = eager.of_sample(), points(axes_of(eager.plot(), "Which of 4 candidates was taken"))
    compared = {step: winner for step, (winner, n) in enumerate(zip(sample.winner, sample.num_compared, strict=True), 1) if n}
    found = {**dict(drawn.get("took the greedy one", [])), **dict(drawn.get("took another one", []))}
    assert found == compared
    assert any(found.values())
    assert all(winner > 0 for _, winner in drawn["took another one"])
    lazy = trace_of(steps=8, num_candidates=4, lazy_threshold=0.5)
    sample, drawn = lazy.of_sample(), points(axes_of(lazy.plot(), "Candidates passed over"))
    passed = {step: n - 1 for step, n in enumerate(sample.num_compared, 1) if n}
    assert {**dict(drawn.get("took the greedy one", [])), **dict(drawn.get("took another one", []))} == passed
    assert len(set(passed.values())) > 1


def test_tokens_without_a_grid_are_a_square_or_a_line():
    for length, shape in ((9, (3, 3)), (10, (1, 10))):
        trace = trace_of(length=length, grid=None, sampler="confidence")
        assert axes_of(trace.plot(), "Order of decoding").images[0].get_array().shape == shape


def test_plots_need_an_extra(monkeypatch):
    trace = trace_of(sampler="confidence")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"^Plots need matplotlib: .*\[eval\]"):
        trace.plot()


def test_plots_leave_the_global_state_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    trace_of(sampler="confidence").plot()._repr_png_()
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_steps_are_chosen_evenly_with_the_first_and_the_last():
    assert _some(1, 8) == [1]
    assert _some(5, 8) == [1, 2, 3, 4, 5]
    assert _some(64, 8) == [1, 10, 19, 28, 37, 46, 55, 64]


def test_lines_break_between_tokens_and_at_line_breaks():
    assert _lines(["ab", "c↵", "d"]) == [[(0, 0, 2), (1, 2, 2)], [(2, 0, 1)]]
    assert _lines(["x" * 60, "y" * 60]) == [[(0, 0, 60)], [(1, 0, 60)]]
    assert _lines(["日本", ""]) == [[(0, 0, 4), (1, 4, 1)]]
