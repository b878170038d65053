from __future__ import annotations

import math

import numpy as np
from helpers.comparison import result

from diffusers_infogain.evaluation import tables
from diffusers_infogain.evaluation.groups import RIGHT
from diffusers_infogain.evaluation.image_comparison import image_groups
from diffusers_infogain.evaluation.statistics import Figure


def test_the_table_shows_both_comparisons_and_marks_the_front():
    groups = image_groups(
        [
            result("maskgit", 4, 4, "1000"),
            result("maskgit", 16, 16, "1100"),
            result("info_gain", 4, 16, "1110", num_candidates=5),
        ]
    )
    others = image_groups([result("maskgit", 4, 4, "1000"), result("maskgit", 16, 16, "1000", guidance_scale=2.0)])
    text = tables.image_report(groups, RIGHT, "Tiny.", [*others, *image_groups([result("maskgit", 16, 16, "1100")])])
    row = next(line for line in text.splitlines() if line.startswith("| 4 | info_gain, N 5"))
    assert "**75" in row
    more, less = "+25.0 ± 25.0 (maskgit, 16 steps)", "+50.0 ± 28.9 (maskgit)"
    assert f"| {more} | {more} | {less} | {more} |" in row  # at equal states, NFE, passes and seconds
    assert sum("| – | – | – | -25.0 ± 25.0 (maskgit, 16 steps) |" in line for line in text.splitlines()) == 1  # the rival itself
    assert "the greedy rules in brackets were chosen on other prompts" in text
    unmeasured = tables.image_table(groups, RIGHT, others[1:])
    rival = "not measured here (maskgit, 16 steps, guidance 2)"
    assert f"| {rival} | {rival} | – | {rival} |" in unmeasured
    assert "points above" not in tables.image_report(groups, RIGHT, "Tiny.")
    assert "Tiny. 4 images per row, seeds 0." in text
    assert "Accuracy (%) against cumulative entropy: no correlation can be told from 3 configurations." in text
    more = image_groups([result("maskgit", n, n, right) for n, right in ((4, "1000"), (8, "1110"), (16, "1100"), (32, "1111"))])
    r = np.corrcoef([4, 8, 16, 32], [1, 3, 2, 4])[0, 1]
    assert f"Pearson's r = {r:.2f} (95 % interval " in tables.image_report(more, RIGHT, "Tiny.")


def test_figures_have_as_many_digits_as_their_error_warrants():
    figure = Figure
    assert tables.format_figure(figure(0.8251, 0.0123, 500), "right") == "82.5 ± 1.2"
    assert tables.format_figure(figure(12.345, 0.0214, 9)) == "12.345 ± 0.021"
    assert tables.format_figure(figure(57.0, 0.0, 9), "num_evaluations") == "57"
    assert tables.format_figure(figure(120.4, math.nan, 9)) == "120"
    assert tables.format_figure(figure(5.1e8, 0.0, 9), "peak_memory") == "510"
    assert tables.format_figure(None) == "–"
