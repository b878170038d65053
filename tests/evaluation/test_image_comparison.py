from __future__ import annotations

import re

import pytest
from helpers.comparison import measured, result

from diffusers_infogain.evaluation import image_comparison
from diffusers_infogain.evaluation.image_comparison import image_groups
from diffusers_infogain.evaluation.prompts import Prompt, requests
from diffusers_infogain.evaluation.runs import FinishedImage
from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.scheduling_infogain import InfoGainScheduler
from diffusers_infogain.trace import RECORDED

CONFIG = dict(InfoGainScheduler(mask_token_id=0).config)


def test_the_grid_repeats_only_what_looks_ahead_for_every_number_of_candidates():
    samplers = [parse_sampler(text) for text in ("default", "maskgit", "info_gain:num_candidates=3")]
    cells = image_comparison.grid(samplers, [4], [2, 8], [1.0], [0, 1], CONFIG)
    of_seed = [(cell.sampler.name, cell.num_candidates) for cell in cells if cell.seed == 1]
    assert of_seed == [("maskgit", None), ("default", 2), ("info_gain:num_candidates=3", 3), ("default", 8)]
    assert len({cell.name for cell in cells}) == len(cells) == 8
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4


def test_a_sampler_with_a_guidance_scale_of_its_own_runs_with_that_one_only():
    names = ("maskgit", "maskgit:guidance_scale=2", "maskgit:guidance_interval=0:0.5")
    cells = image_comparison.grid([parse_sampler(name) for name in names], [4], None, [1.0, 3.0], [0], CONFIG)
    scales = {name: [cell.guidance_scale for cell in cells if cell.sampler.name == name] for name in names}
    assert scales == {names[0]: [1.0, 3.0], names[1]: [2], names[2]: [1.0, 3.0]}


def test_default_is_what_the_pipeline_does():
    own = InfoGainScheduler(mask_token_id=0, sampler="klass", num_candidates=6, top_k=3)
    config = {name: value for name, value in own.config.items() if not name.startswith("_")}
    (cell,) = image_comparison.grid([parse_sampler("default:top_p=0.5")], [4], None, [1.0], [0], config)
    assert (cell.num_candidates, cell.sampler.looks_ahead) == (None, False)
    assert InfoGainScheduler.from_config(config, **cell.sampler.scheduler).config == {**config, "top_p": 0.5}
    specs = [parse_sampler(name) for name in ("default", "paper", "info_gain", "lookum:num_candidates=3")]
    cells = image_comparison.grid(specs, [4], None, [1.0], [0], CONFIG)
    numbers = {cell.sampler.name: cell.num_candidates for cell in cells}
    assert numbers == {"default": 4, "paper": 8, "info_gain": 4, "lookum:num_candidates=3": 3}


def test_every_run_has_a_folder_of_its_own():
    names = ["maskgit", "maskgit:top_k=1", "maskgit:choice_temperature=1:1", "maskgit:choice_temperature=1:-1"]
    names += [
        "maskgit:choice_temperature=1-1",
        f"pc_sampler:pc_frequencies={'n' * 300}",
        f"pc_sampler:pc_frequencies={'n' * 301}",
    ]
    scales = [1.0, 1.2, 1.2000001, 1.2000002, 1.2000000000000002]
    cells = image_comparison.grid([parse_sampler(name) for name in names], [4], None, scales, [0], CONFIG)
    assert len({cell.name for cell in cells}) == len(cells) == 35
    assert max(len(cell.name) for cell in cells) < 200
    assert "maskgit-top_k=1-steps4-g1.2-seed0" in {cell.name for cell in cells}
    assert "maskgit-steps4-g1-seed0" in {cell.name for cell in cells}


def test_figures_measured_in_different_ways_do_not_meet():
    def figures(*results):
        return [sorted(group.figures.keys() & {"KID", "FID"}) for group in image_groups(results)]

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
        ({"num_evaluations": [1.5, 2]}, "must have a list of int in its field `num_evaluations`, got [1.5, 2]."),
        ({"winner": 5}, "must have a list of int in its field `winner`, got 5."),
        ({"winner": [1]}, "must have lists of one length in num_decoded, cost, log_probability, winner, num_compared, "),
    ],
)
def test_an_image_that_says_other_things_is_named(metadata, message, tmp_path):
    metadata = {name: [1.0, 0.0] if name in ("cost", "log_probability") else [1, 0] for name in RECORDED} | metadata
    image = FinishedImage(requests([Prompt("a")])[0], tmp_path / "a.png", metadata)
    with pytest.raises(ValueError, match=re.escape(f"The text chunk 'infogain' of {tmp_path}/a.png {message}")):
        image_comparison.describe_run([image])


def test_a_run_is_described_by_its_files(tmp_path):
    records = [
        {
            **{"num_decoded": [1, 2, 1], "cost": [1.0, 2.0, 0.5], "log_probability": [-1.0, -1.5, 0.0], "winner": [1, 0, 0]},
            **{"num_compared": [2, 2, 0], "num_states": [3, 2, 0], "num_evaluations": [6, 4, 0], "num_passes": [2, 1, 0]},
        },
        {
            **{"num_decoded": [3, 1], "cost": [3.0, 0.0], "log_probability": [-2.0, 0.0], "winner": [0, 0]},
            **{"num_compared": [1, 0], "num_states": [2, 0], "num_evaluations": [4, 0], "num_passes": [2, 0]},
        },
    ]
    every = requests([Prompt("a"), Prompt("b")])
    images = [FinishedImage(request, tmp_path, record) for request, record in zip(every, records, strict=True)]
    assert image_comparison.describe_run(images) == {
        "num_states": 3.5,
        "num_evaluations": 7.0,
        "sequential_passes": 2.5,
        "cumulative_entropies": [3.5, 3.0],
        "entropy_by_step": [2.0, 3.0, 3.25],
        # A single candidate is no decision.
        "decisions_by_step": [1, 1, 0],
        "other_winner_by_step": [1, 0, 0],
    }
