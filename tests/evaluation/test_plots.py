from __future__ import annotations

import pytest
from helpers.comparison import result

from diffusers_infogain.evaluation import plots
from diffusers_infogain.evaluation.groups import RIGHT
from diffusers_infogain.evaluation.image_comparison import image_groups


def test_plots_are_written(tmp_path):
    runs = [
        result(name, steps, rows, right, num_candidates=num, entropies=[entropy] * 4)
        for name, steps, rows, right, num, entropy in (
            ("maskgit", 4, 4, "1000", None, 5.0),
            ("maskgit", 8, 8, "1100", None, 4.0),
            ("info_gain", 4, 13, "1110", 4, 3.0),
            ("info_gain", 8, 29, "1111", 4, 2.0),
        )
    ]
    groups = image_groups(runs)
    paths = plots.write_plots(groups, RIGHT, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert {path.name for path in paths} >= {
        "pareto_rows.png",
        "pareto_calls.png",
        "quality_entropy.png",
        "winners.png",
        "entropy_4_steps.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def many_groups():
    runs = [
        result(name, steps, rows, right, num_candidates=num, entropies=[entropy] * 4)
        for name, steps, rows, right, num, entropy in (
            ("maskgit", 4, 4, "1000", None, 5.0),
            ("maskgit", 8, 8, "1100", None, 4.0),
            ("maskgit:entropy_bound=0.25", 64, 9, "1110", None, 4.0),
            ("maskgit:entropy_bound=0.5", 64, 7, "1100", None, 4.5),
            ("default", 8, 13, "1110", 4, 3.0),
            ("paper", 8, 57, "0000", 8, 9.0),
            *((name, 8, 8, "0000", None, 6.0) for name in ("halton", "uniform", "confidence", "margin", "entropy")),
        )
    ]
    return image_groups(runs)


def test_at_most_six_samplers_are_named_and_no_two_look_alike():
    series = plots.choose_series(many_groups(), RIGHT)
    assert len(series) == 6
    assert {"lookahead (default)", "lookahead as in the paper"} <= {one.label for one in series}
    looks = [(one.style["color"], one.style["linestyle"], one.style["marker"]) for one in series]
    assert len(set(looks)) == 6
    named = plots.choose_series(many_groups(), RIGHT, ["MaskGIT", "margin"])
    assert [one.label for one in named] == ["MaskGIT", "margin"]
    with pytest.raises(ValueError, match=r"`names` must be among .*MaskGIT.*, got 'maskgit'"):
        plots.choose_series(many_groups(), RIGHT, ["maskgit"])


def test_lines_join_what_differs_in_one_setting():
    series = {one.label: one for one in plots.choose_series(many_groups(), RIGHT)}
    assert [len(strand) for strand in series["MaskGIT"].strands("num_evaluations")] == [2]
    groups = image_groups([result("maskgit:entropy_bound=0.25", n, n, "1000") for n in (8, 16)])
    (one,) = plots.choose_series(groups, RIGHT)
    assert [len(strand) for strand in one.strands("num_evaluations")] == [1, 1]


def test_a_sampler_has_one_color_in_all_pictures(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure}))
    plots.write_plots(many_groups(), RIGHT, tmp_path)
    colors = {"lookahead (default)": set(), "lookahead as in the paper": set()}
    for name, figure in drawn.items():
        axes = figure.axes[0]
        legend = axes.get_legend()
        texts = {text.get_text(): text.get_color() for text in axes.texts}
        if legend:
            handles = zip(legend.get_texts(), legend.legend_handles, strict=True)
            texts = {text.get_text(): handle.get_color() for text, handle in handles}
        for label, found in colors.items():
            found |= {color for text, color in texts.items() if text.startswith(label)}
        if name == "winners.png":
            assert {"chance, N = 4", "chance, N = 8"} <= set(texts)
            levels = [line.get_ydata()[0] for line in axes.lines if set(line.get_xdata()) == {0, 1}]
            assert levels == [75.0, 87.5]
    assert colors == {"lookahead (default)": {"#D55E00"}, "lookahead as in the paper": {"#000000"}}


def test_names_beside_a_picture_keep_their_distance():
    found = plots._spread([0.1, 0.5, 0.51, 0.96, 0.99], gap=0.05, highest=0.97)
    assert found == pytest.approx([0.1, 0.5, 0.55, 0.92, 0.97])
    assert plots._spread([], 0.05, 0.97) == []
