from __future__ import annotations

import re

import pytest

from diffusers_infogain.choices import PRESETS
from diffusers_infogain.evaluation.samplers import SamplerSpec, describe_sampler, parse_sampler
from diffusers_infogain.rules import SAMPLERS


def test_a_sampler_is_a_name_with_settings():
    assert parse_sampler("maskgit") == SamplerSpec("maskgit", {"sampler": "maskgit"}, {})
    text = "info_gain:certainty=uniform,gain_weight=0.5,position_temperature=4:0,num_beams=2"
    settings = {"sampler": "info_gain", "certainty": "uniform", "gain_weight": 0.5, "position_temperature": [4, 0]}
    assert parse_sampler(text) == SamplerSpec(text, settings, {"num_beams": 2})
    guided = parse_sampler("pivot:guidance_scale=1.5,guidance_interval=0:0.5,guidance_schedule=linear,num_runs=2")
    assert guided.call == {"num_runs": 2, "guidance_scale": 1.5, "guidance_schedule": "linear", "guidance_interval": [0, 0.5]}
    assert parse_sampler("maskgit:approximate_cache=ml_cache:0.9:0.3:5,top_p=0.9").call == {
        "approximate_cache": "ml_cache:0.9:0.3:5"
    }
    paper = parse_sampler("paper:num_candidates=4").scheduler
    assert (paper["gain_reduction"], paper["certainty"], paper["num_candidates"]) == ("mean", "confidence", 4)
    assert [parse_sampler(name).looks_ahead for name in ("default", "paper", "lookum", "klass")] == [True, True, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "pivot:approximate_cache=kv",
            "`approximate_cache` must be None, 'context:TOLERANCE' with a share from 0 to 1, or 'ml_cache:RATIO:WARMUP:INTERVAL'",
        ),
        (
            "pivot:guidance_interval=1:0",
            "`guidance_interval` must be a pair (start, stop) with 0 <= start < stop <= 1, got ",
        ),
        ("nicest", "A sampler must be one of info_gain, lookum, confidence, "),
        ("maskgit:fast", "A sampler's settings must have the form key=value,key=value, got 'fast' in 'maskgit:fast'."),
        ("maskgit:speed=3", "A sampler's setting must be one of masking_schedule, schedule_counts, tokens_per_step, sampler, "),
    ],
)
def test_a_sampler_that_is_none(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_sampler(text)


def test_text_has_no_guidance():
    message = "A sampler's setting must be one of masking_schedule, .*num_beams, num_runs, got 'guidance_scale'"
    with pytest.raises(ValueError, match=message):
        parse_sampler("maskgit:guidance_scale=2", guided=False)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("maskgit:entropy_bound=0.25", "MaskGIT, entropy bound 0.25"),
        ("info_gain:gain_reduction=sum,entropy_bound=0,num_beams=2", "lookahead, summed gain, no entropy bound, 2 beams"),
        ("info_gain:certainty=pivot", "lookahead, proposals by pivot"),
        ("entropy:num_runs=6,token_temperature=0.4", "lowest entropy, best of 6, token temperature 0.4"),
        ("pivot:guidance_scale=2,guidance_interval=0:0.5", "pivot, guidance scale 2, guidance interval 0 to 0.5"),
        ("fast:best_run_by=log_likelihood,top_p=0.9", "fast (greedy), best run by log likelihood, top-p 0.9"),
        ("left:num_tries=4,retry_above_nats=15", "left to right, at most 4 tries, tried anew above 15 nats"),
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
