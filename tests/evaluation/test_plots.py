from __future__ import annotations

import itertools

import pytest
from helpers.comparison import result

from diffusers_infogain.evaluation import plots
from diffusers_infogain.evaluation.groups import RIGHT, Group
from diffusers_infogain.evaluation.image_comparison import image_groups
from diffusers_infogain.evaluation.looks import ink
from diffusers_infogain.evaluation.statistics import Figure


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
        "decisions.png",
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
    looks = [(one.style["color"], one.style["marker"], one.style["fillstyle"]) for one in series]
    assert len(set(looks)) == 6
    named = plots.choose_series(many_groups(), RIGHT, ["MaskGIT", "margin"])
    assert [one.label for one in named] == ["MaskGIT", "margin"]
    with pytest.raises(ValueError, match=r"`names` must be among .*MaskGIT.*, got 'maskgit'"):
        plots.choose_series(many_groups(), RIGHT, ["maskgit"])
    with pytest.raises(ValueError, match=r"`names` must be at most 6, got 7\."):
        plots.choose_series(many_groups(), RIGHT, ["margin"] * 7)


def test_lines_join_what_differs_in_one_setting():
    series = {one.label: one for one in plots.choose_series(many_groups(), RIGHT)}
    assert [len(strand) for strand in series["MaskGIT"].strands("num_evaluations")] == [2]
    groups = image_groups([result("maskgit:entropy_bound=0.25", n, n, "1000") for n in (8, 16)])
    (one,) = plots.choose_series(groups, RIGHT)
    assert [len(strand) for strand in one.strands("num_evaluations")] == [1, 1]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, by the name of their file."""
    figures = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.update({path.name: figure}))
    yield figures
    plots.load_pyplot().close("all")


def texts_of(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


def legend_of(figure):
    return {text.get_text() for text in figure.axes[0].get_legend().get_texts()}


def test_a_sampler_has_one_color_in_all_pictures(drawn, tmp_path):
    plots.write_plots(many_groups(), RIGHT, tmp_path)
    colors = {"lookahead (default)": set(), "lookahead as in the paper": set()}
    for name, figure in drawn.items():
        if name == "decisions.png":
            continue
        for label, found in colors.items():
            found |= {text.get_color() for text in texts_of(figure) if text.get_text().startswith(label)}
    assert colors == {"lookahead (default)": {ink("#D55E00")}, "lookahead as in the paper": {ink("#000000")}}


def test_the_front_and_what_has_no_name_are_in_the_legend(drawn, tmp_path):
    plots.write_plots(many_groups(), RIGHT, tmp_path)
    assert legend_of(drawn["pareto_rows.png"]) == {"frontier: the best at no more cost", "3 other configurations"}
    assert legend_of(drawn["quality_entropy.png"]) == {"3 other configurations"}
    assert legend_of(drawn["entropy_8_steps.png"]) == {"3 other configurations"}


def test_names_stand_in_the_picture_and_on_nothing_else(drawn, tmp_path):
    plots.write_plots(many_groups(), RIGHT, tmp_path)
    counted = 0
    for name, figure in drawn.items():
        if name == "decisions.png":
            continue
        figure.draw_without_rendering()
        frame = figure.axes[0].get_window_extent()
        boxes = [text.get_window_extent() for text in texts_of(figure)]
        for first, second in itertools.combinations(boxes, 2):
            assert not first.overlaps(second), name
            counted += 1
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes), name
    assert counted > 20


def test_a_lazy_sampler_has_no_chance_level(drawn, tmp_path):
    compared = {"decisions_by_step": [4, 2], "other_winner_by_step": [3, 1]}
    runs = [
        result("paper", 8, 57, "0000", num_candidates=8, **{**compared, "scheduler": {"lazy_threshold": None}}),
        result("default", 8, 13, "1110", num_candidates=4, **{**compared, "scheduler": {"lazy_threshold": -5.0}}),
        result("default:num_runs=4", 8, 53, "1110", num_candidates=4, **compared),
        result("maskgit", 8, 8, "1000"),
    ]
    plots.plot_decisions(image_groups(runs), RIGHT, tmp_path / "decisions.png")
    axes = drawn["decisions.png"].axes[0]
    (chance,) = axes.lines
    assert chance.get_xdata() == pytest.approx([(1 - 1 / 8) * 6 / 4])
    assert [bar.get_width() for bar in axes.patches[:4]] == pytest.approx([1.5, 1.0, 1.5, 1.0])
    said = [text.get_text().strip() for text in axes.texts]
    assert {"lookahead (default), N = 4", "rejected the first: 1.5, took another: 1"} <= set(said)
    assert {"lookahead as in the paper, N = 8", "compared all: 1.5, took another: 1"} <= set(said)
    assert len(said) == 4  # neither the search nor the greedy rule


def test_a_comparison_without_a_lookahead_has_no_decisions(tmp_path):
    plots.plot_decisions(image_groups([result("maskgit", 8, 8, "1000")]), RIGHT, tmp_path / "decisions.png")
    assert (tmp_path / "decisions.png").exists()


def text_groups():
    samplers = [f"{name}{settings}" for name in ("left", "pivot", "entropy", "margin") for settings in ("", ":top_p=0.9")]
    samplers += ["left:token_temperature=0.7", "text"]
    figures = [{"right": Figure(0.1 * i, 0.01, 9), "distinct": Figure(1 - 0.05 * i, 0.01, 9)} for i in range(len(samplers))]
    keys = [{"task": "sudoku", "sampler": name, "tokens_per_step": 1} for name in samplers]
    return [Group(key, own, []) for key, own in zip(keys, figures, strict=True)]


def test_text_comparisons_name_six_samplers_too(drawn, tmp_path):
    plots.plot_variety(text_groups(), tmp_path / "sudoku.png")
    names = [text.get_text() for text in texts_of(drawn["sudoku.png"])]
    assert len(names) == 6
    assert {"lookahead (text)", "left to right"} <= set(names)
    assert legend_of(drawn["sudoku.png"]) == {"frontier: no other has more of both", "3 other configurations"}


def test_the_front_of_both_is_what_nothing_beats():
    points = {"a": (0.9, 0.1), "b": (0.5, 0.5), "c": (0.4, 0.4), "d": (0.1, 0.9), "e": (0.5, 0.3)}
    groups = [
        Group({"sampler": name}, {"right": Figure(right, 0.0, 9), "distinct": Figure(distinct, 0.0, 9)}, [])
        for name, (right, distinct) in points.items()
    ]
    assert [group["sampler"] for group in plots._best_of_both(groups)] == ["a", "b", "d"]
