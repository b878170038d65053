from __future__ import annotations

import math
import re

import numpy as np
import pytest

from diffusers_infogain.choices import PRESETS, SAMPLERS
from diffusers_infogain.evaluation import comparison, report
from diffusers_infogain.evaluation.comparison import Quality, SamplerSpec, parse_sampler
from diffusers_infogain.evaluation.names import describe_sampler
from diffusers_infogain.evaluation.prompts import Prompt, requests
from diffusers_infogain.evaluation.runs import FinishedImage
from diffusers_infogain.scheduling_infogain import InfoGainScheduler

RIGHT = Quality("right", True)


def result(sampler, steps, rows, right, *, seed=0, num_candidates=None, entropies=None, guidance_scale=1.0, **more):
    return {
        "sampler": sampler,
        "steps": steps,
        "num_candidates": num_candidates,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "looks_ahead": num_candidates is not None,
        "num_images_per_prompt": 1,
        "model_rows": rows,
        "model_calls": steps,
        "cumulative_entropies": entropies or [float(rows)] * len(right),
        "entropy_by_step": [1.0] * steps,
        "decisions_by_step": [4] * (steps - 1) + [0],
        "other_winner_by_step": [3] * (steps - 1) + [0],
        "seconds_per_image": 0.1,
        "peak_memory": None,
        "right": right,
        "metrics": {},
        **more,
    }


def measured(identity=None, **figures):
    return {name: {"identity": identity or {}, "figures": {name: value}} for name, value in figures.items()}


CONFIG = dict(InfoGainScheduler(mask_token_id=0).config)


def test_a_sampler_is_a_name_with_settings():
    assert parse_sampler("maskgit") == SamplerSpec("maskgit", {"sampler": "maskgit"}, {})
    text = "info_gain:certainty=uniform,gain_weight=0.5,position_temperature=4:0,num_beams=2"
    settings = {"sampler": "info_gain", "certainty": "uniform", "gain_weight": 0.5, "position_temperature": [4, 0]}
    assert parse_sampler(text) == SamplerSpec(text, settings, {"num_beams": 2})
    paper = parse_sampler("paper:num_candidates=4").scheduler
    assert (paper["gain_reduction"], paper["certainty"], paper["num_candidates"]) == ("mean", "confidence", 4)
    assert [parse_sampler(name).looks_ahead for name in ("default", "paper", "lookum", "klass")] == [True, True, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "A sampler must be one of info_gain, lookum, confidence, "),
        ("maskgit:fast", "A sampler's settings must have the form key=value,key=value, got 'fast' in 'maskgit:fast'."),
        ("maskgit:speed=3", "A sampler's setting must be one of masking_schedule, tokens_per_step, sampler, certainty, "),
    ],
)
def test_a_sampler_that_is_none(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_sampler(text)


def test_the_grid_repeats_only_what_looks_ahead_for_every_number_of_candidates():
    samplers = [parse_sampler(text) for text in ("default", "maskgit", "info_gain:num_candidates=3")]
    cells = comparison.grid(samplers, [4], [2, 8], [1.0], [0, 1], CONFIG)
    of_seed = [(cell.sampler.name, cell.num_candidates) for cell in cells if cell.seed == 1]
    assert of_seed == [("maskgit", None), ("default", 2), ("info_gain:num_candidates=3", 3), ("default", 8)]
    assert len({cell.name for cell in cells}) == len(cells) == 8
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4


def test_default_is_what_the_pipeline_does():
    own = InfoGainScheduler(mask_token_id=0, sampler="klass", num_candidates=6, top_k=3)
    config = {name: value for name, value in own.config.items() if not name.startswith("_")}
    (cell,) = comparison.grid([parse_sampler("default:top_p=0.5")], [4], None, [1.0], [0], config)
    assert (cell.num_candidates, cell.sampler.looks_ahead) == (None, False)
    assert InfoGainScheduler.from_config(config, **cell.sampler.scheduler).config == {**config, "top_p": 0.5}
    specs = [parse_sampler(name) for name in ("default", "paper", "info_gain", "lookum:num_candidates=3")]
    cells = comparison.grid(specs, [4], None, [1.0], [0], CONFIG)
    numbers = {cell.sampler.name: cell.num_candidates for cell in cells}
    assert numbers == {"default": 4, "paper": 8, "info_gain": 4, "lookum:num_candidates=3": 3}


def test_every_run_has_a_folder_of_its_own():
    names = ["maskgit", "maskgit:top_k=1", "maskgit:position_temperature=1:1", "maskgit:position_temperature=1:-1"]
    names += [
        "maskgit:position_temperature=1-1",
        f"pc_sampler:pc_frequencies={'n' * 300}",
        f"pc_sampler:pc_frequencies={'n' * 301}",
    ]
    scales = [1.0, 1.2, 1.2000001, 1.2000002, 1.2000000000000002]
    cells = comparison.grid([parse_sampler(name) for name in names], [4], None, scales, [0], CONFIG)
    assert len({cell.name for cell in cells}) == len(cells) == 35
    assert max(len(cell.name) for cell in cells) < 200
    assert "maskgit-top_k=1-steps4-g1.2-seed0" in {cell.name for cell in cells}
    assert "maskgit-steps4-g1-seed0" in {cell.name for cell in cells}


def test_figures_measured_in_different_ways_do_not_meet():
    def figures(*results):
        return [sorted(group.figures.keys() & {"KID", "FID"}) for group in comparison.summarize(results)]

    one, other = {"reference": "a"}, {"reference": "b"}
    first = result("a", 2, 2, "10") | {"metrics": measured(one, KID=1.0, FID=2.0)}
    same = result("b", 2, 2, "10") | {"metrics": measured(one, KID=3.0) | measured(other, FID=2.0)}
    assert figures(first) == [["FID", "KID"]]
    assert figures(first, same) == [["KID"], ["KID"]]
    seed = result("a", 2, 2, "10", seed=1) | {"metrics": measured(one, FID=2.0)}
    assert figures(first, seed) == [["FID"]]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"cost": "x"}, 'must have a list of float in its field `cost`, got "x".'),
        ({"cost": [1.0, None]}, "must have a list of float in its field `cost`, got [1.0, null]."),
        ({"model_rows": [1.5, 2]}, "must have a list of int in its field `model_rows`, got [1.5, 2]."),
        ({"winner": 5}, "must have a list of int in its field `winner`, got 5."),
        ({"winner": [1]}, "must have as many `cost` as `model_rows` and `winner`."),
    ],
)
def test_an_image_that_says_other_things_is_named(metadata, message, tmp_path):
    metadata = {"cost": [1.0, 0.0], "model_rows": [1, 1], "winner": [0, 0], **metadata}
    image = FinishedImage(requests([Prompt("a")])[0], tmp_path / "a.png", metadata)
    with pytest.raises(ValueError, match=re.escape(f"The text chunk 'infogain' of {tmp_path}/a.png {message}")):
        comparison.describe_run([image], looks_ahead=False)


def test_a_run_is_described_by_its_files(tmp_path):
    records = [
        {"cost": [1.0, 2.0, 0.5], "winner": [1, 0, 0], "model_rows": [3, 2, 0]},
        {"cost": [3.0, 0.0], "winner": [0, 0], "model_rows": [2, 0]},
    ]
    every = requests([Prompt("a"), Prompt("b")])
    images = [FinishedImage(request, tmp_path, record) for request, record in zip(every, records, strict=True)]
    greedy = comparison.describe_run(images, looks_ahead=False)  # the rows are then those of several runs side by side
    assert (greedy["model_calls"], greedy["decisions_by_step"]) == (1.5, [0, 0, 0])
    assert comparison.describe_run(images, looks_ahead=True) == {
        "model_rows": 3.5,
        "model_calls": 2.5,  # canvas, candidates and candidates of the first; canvas and candidates of the second
        "cumulative_entropies": [3.5, 3.0],
        "entropy_by_step": [2.0, 3.0, 3.25],
        # Three rows in the first step are the empty canvas and two candidates; two are one candidate, which is no decision.
        "decisions_by_step": [1, 1, 0],
        "other_winner_by_step": [1, 0, 0],
    }


def test_seeds_are_pooled_with_errors_over_prompts():
    runs = [result("a", 2, 2, "1100", seed=0), result("a", 2, 2, "1000", seed=1, seconds_per_image=0.3)]
    (group,) = comparison.summarize(runs)
    assert group.seeds == [0, 1]
    means = np.array([1.0, 0.5, 0.0, 0.0])
    assert group.figures["right"].value == means.mean()
    assert group.figures["right"].standard_error == pytest.approx(means.std(ddof=1) / 2)
    assert group.figures["right"].n == 8
    assert group.figures["seconds_per_image"].value == pytest.approx(0.2)
    assert "peak_memory" not in group.figures


def test_a_difference_is_paired_by_prompt_and_seed():
    first, second = comparison.summarize(
        [result("a", 2, 2, "1110"), result("b", 2, 2, "1100"), result("b", 2, 2, "0000", seed=1)]
    )
    gap = comparison.difference(first, second)
    gaps = np.array([0, 0, 1, 0])
    assert gap.value == gaps.mean()
    assert gap.standard_error == pytest.approx(gaps.std(ddof=1) / 2)
    other_seed = comparison.summarize([result("c", 2, 2, "1111", seed=5)])[0]
    assert comparison.difference(first, other_seed) is None


def test_the_rival_may_take_other_steps_bounds_and_runs_as_long_as_it_costs_no_more():
    groups = comparison.summarize(
        [
            result("a", 4, 4, "1000"),
            result("b", 4, 4, "1100"),
            result("a:entropy_bound=1", 64, 6, "1100", model_calls=6),
            result("b:num_runs=8", 4, 32, "1111"),
            result("a:num_runs=4", 6, 16, "1111"),
            result("a", 16, 16, "1110"),
            result("a", 32, 32, "1111"),
            result("info_gain", 4, 16.1, "1110", num_candidates=5),
            result("a", 4, 4, "1111", guidance_scale=2.0),
        ]
    )
    ours = next(group for group in groups if group.looks_ahead)
    assert comparison.best_greedy(groups, ours, RIGHT, equal="model_calls").label == "b"
    assert comparison.best_greedy(groups, ours, RIGHT, equal="model_rows").label == "a:num_runs=4"
    with pytest.raises(ValueError, match="`equal` must be one of model_calls, model_rows, got 'time'"):
        comparison.best_greedy(groups, ours, RIGHT, equal="time")


def test_the_pareto_front_holds_what_no_cheaper_group_beats():
    runs = [result(name, rows, rows, right) for name, rows, right in (("a", 2, "1000"), ("b", 4, "1000"), ("c", 8, "1100"))]
    groups = comparison.summarize([*runs, result("d", 8, 8, "1110")])
    assert [group.sampler for group in comparison.pareto_front(groups, RIGHT)] == ["a", "d"]


def test_samplers_are_ranked_by_the_best_figure_there_is():
    plain = comparison.summarize([result("a", 2, 2, "10")])
    assert comparison.choose_quality(plain) == RIGHT
    unchecked = result("a", 2, 2, "10") | {"right": None, "metrics": measured(KID=0.1) | measured(**{"FD (demo)": 2.0})}
    assert comparison.choose_quality(comparison.summarize([unchecked])) == Quality("FD (demo)", False)
    bare = result("a", 2, 2, "10") | {"right": None}
    assert comparison.choose_quality(comparison.summarize([bare])) == Quality("cumulative_entropy", False)


def test_the_table_shows_both_comparisons_and_marks_the_front():
    groups = comparison.summarize(
        [
            result("maskgit", 4, 4, "1000"),
            result("maskgit", 16, 16, "1100"),
            result("info_gain", 4, 16, "1110", num_candidates=5),
        ]
    )
    text = report.comparison_report(groups, RIGHT, "Tiny.")
    row = next(line for line in text.splitlines() if line.startswith("| 4 | info_gain, N 5"))
    assert "**75" in row
    assert "+50.0 ± 28.9 (maskgit, 4 steps)" in row
    assert "+25.0 ± 25.0 (maskgit, 16 steps)" in row
    assert "Tiny. 4 images per row, seeds 0." in text
    assert "Right (%) against cumulative entropy: no correlation can be told from 3 configurations." in text
    more = comparison.summarize(
        [result("maskgit", n, n, right) for n, right in ((4, "1000"), (8, "1110"), (16, "1100"), (32, "1111"))]
    )
    r = np.corrcoef([4, 8, 16, 32], [1, 3, 2, 4])[0, 1]
    assert f"Pearson's r = {r:.2f} (95 % interval " in report.comparison_report(more, RIGHT, "Tiny.")


def test_figures_have_as_many_digits_as_their_error_warrants():
    figure = comparison.Figure
    assert report.format_figure(figure(0.8251, 0.0123, 500), "right") == "82.5 ± 1.2"
    assert report.format_figure(figure(12.345, 0.0214, 9)) == "12.345 ± 0.021"
    assert report.format_figure(figure(57.0, 0.0, 9), "model_rows") == "57"
    assert report.format_figure(figure(120.4, math.nan, 9)) == "120"
    assert report.format_figure(figure(5.1e8, 0.0, 9), "peak_memory") == "510"
    assert report.format_figure(None) == "–"


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
    groups = comparison.summarize(runs)
    paths = report.write_plots(groups, RIGHT, tmp_path)
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
    return comparison.summarize(runs)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("maskgit:entropy_bound=0.25", "MaskGIT, entropy bound 0.25"),
        ("info_gain:gain_reduction=sum,entropy_bound=0,num_beams=2", "lookahead, summed gain, no entropy bound, 2 beams"),
        ("info_gain:certainty=pivot", "lookahead, proposals by pivot"),
        ("entropy:num_runs=6,token_temperature=0.4", "lowest entropy, best of 6, token temperature 0.4"),
        ("pc_sampler:pc_frequencies=a/b.safetensors", "PC-Sampler, token frequencies"),
        ("uniform:position_temperature=4:0", "random order, position temperature 4 to 0"),
    ],
)
def test_pictures_name_samplers_in_words(text, name):
    assert describe_sampler(text) == name
    assert describe_sampler("maskgit:entropy_bound=0.25", bounds=False) == "MaskGIT, entropy bound"


def test_every_sampler_has_a_name_in_words():
    for name in (*SAMPLERS, *PRESETS):
        assert "_" not in describe_sampler(name)


def test_at_most_six_samplers_are_named_and_no_two_look_alike():
    series = report.choose_series(many_groups(), RIGHT)
    assert len(series) == 6
    assert {"lookahead (default)", "lookahead as in the paper"} <= {one.label for one in series}
    looks = [(one.style["color"], one.style["linestyle"], one.style["marker"]) for one in series]
    assert len(set(looks)) == 6
    named = report.choose_series(many_groups(), RIGHT, ["MaskGIT", "margin"])
    assert [one.label for one in named] == ["MaskGIT", "margin"]
    with pytest.raises(ValueError, match=r"`names` must be among .*MaskGIT.*, got 'maskgit'"):
        report.choose_series(many_groups(), RIGHT, ["maskgit"])


def test_lines_join_what_differs_in_one_setting():
    series = {one.label: one for one in report.choose_series(many_groups(), RIGHT)}
    assert [len(strand) for strand in series["MaskGIT"].strands("model_rows")] == [2]
    groups = comparison.summarize([result("maskgit:entropy_bound=0.25", n, n, "1000") for n in (8, 16)])
    (one,) = report.choose_series(groups, RIGHT)
    assert [len(strand) for strand in one.strands("model_rows")] == [1, 1]


def test_a_sampler_has_one_color_in_all_pictures(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.update({path.name: figure}))
    report.write_plots(many_groups(), RIGHT, tmp_path)
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
    assert colors == {"lookahead (default)": {"#CC79A7"}, "lookahead as in the paper": {"#000000"}}


def test_names_beside_a_picture_keep_their_distance():
    found = report._spread([0.1, 0.5, 0.51, 0.96, 0.99], gap=0.05, highest=0.97)
    assert found == pytest.approx([0.1, 0.5, 0.55, 0.92, 0.97])
    assert report._spread([], 0.05, 0.97) == []
