"""A model's repository carries the guidance that suits it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.amused import make_components

import diffusers_infogain
from diffusers_infogain import InfoGainPipeline, load
from diffusers_infogain.loading import IMAGE_PIPELINES


def make_pipe(**more) -> InfoGainPipeline:
    pipe = InfoGainPipeline(**make_components(), **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, **call) -> torch.Tensor:
    return pipe("a", generator=torch.Generator().manual_seed(0), output_type="pt", num_inference_steps=2, **call).images


def test_a_call_without_guidance_takes_the_models_own():
    pipe, family = make_pipe(default_guidance_scale=3.0), make_pipe()
    assert torch.equal(image(pipe), image(family, guidance_scale=3.0))
    assert torch.equal(image(family), image(pipe, guidance_scale=10.0))
    assert not torch.equal(image(pipe), image(family))
    assert (pipe.default_guidance_scale, family.default_guidance_scale) == (3.0, 10.0)


def test_it_is_saved_and_loaded_with_the_model(tmp_path):
    make_pipe(default_guidance_scale=3.0).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["default_guidance_scale"] == 3.0
    again = load(tmp_path)
    assert again.default_guidance_scale == 3.0
    assert InfoGainPipeline.from_pipe(again).default_guidance_scale == 3.0
    assert load(tmp_path, default_guidance_scale=4.0).default_guidance_scale == 4.0
    again.save_pretrained(tmp_path / "twice")
    assert load(tmp_path / "twice").default_guidance_scale == 3.0
    by_stub = DiffusionPipeline.from_pretrained(
        str(tmp_path), custom_pipeline=diffusers_infogain.CUSTOM_PIPELINE, trust_remote_code=True
    )
    assert by_stub.default_guidance_scale == 3.0


def test_repositories_without_one_stay_as_they_were(tmp_path):
    make_pipe().save_pretrained(tmp_path)
    assert "default_guidance_scale" not in json.loads((tmp_path / "model_index.json").read_text())
    assert load(tmp_path).default_guidance_scale == 10.0


def test_diffusers_loads_a_repository_that_has_one(tmp_path):
    amused = pytest.importorskip("diffusers").AmusedPipeline
    make_pipe(default_guidance_scale=3.0).save_pretrained(tmp_path)
    assert type(amused.from_pretrained(tmp_path)) is amused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", True])
def test_it_must_be_a_number(value):
    with pytest.raises(ValueError, match="`default_guidance_scale` must be a number"):
        make_pipe(default_guidance_scale=value)


def test_every_family_has_one():
    scales = {kind.__name__: kind.family_guidance_scale for kind in IMAGE_PIPELINES}
    assert scales == {
        "InfoGainPipeline": 10.0,
        "InfoGainMMaDAPipeline": 3.5,
        "InfoGainShowoPipeline": 5.0,
        "InfoGainMaskGITPipeline": 0.5,
        "InfoGainTiTokPipeline": 4.5,
        "InfoGainMaskGenPipeline": 12.0,
        "InfoGainMeissonicPipeline": 9.0,
        "InfoGainLuminaPipeline": 4.0,
    }
