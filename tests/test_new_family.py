"""The worked example of a new family of image models, through everything that the base class does for it."""

from __future__ import annotations

import inspect
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sampling import generators

from diffusers_infogain import InfoGainScheduler, decode
from diffusers_infogain.image_pipeline import InfoGainImagePipeline

SCRIPT = Path(__file__).parent.parent / "examples" / "new_family.py"
MASK, CODES, LENGTH = 16, 16, 64
PROMPTS = ["stripes", "dots", "waves"]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def make(example):
    def make_quiet(**settings: Any) -> InfoGainImagePipeline:
        pipe = example["make_pipeline"](**settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make_quiet


def test_the_example_runs_as_it_stands(capsys):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": 32")[0] for line in lines] == ["one run", "{'num_beams': 2}", "{'num_runs': 3}"]
    assert all("32 pixels wide" in line and "4 candidates" in line for line in lines)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"num_runs": 2}], ids=str)
@pytest.mark.parametrize("chunk", [None, 3])
def test_images_are_decoded_with_guidance_lookahead_and_searches_as_each_alone(make, guidance_scale, search, chunk):
    pipe = make(token_temperature=0.7)
    call = {"guidance_scale": guidance_scale, "num_inference_steps": 3, "output_type": "latent", **search}
    output = pipe(PROMPTS, negative_prompt="dots", generator=generators(0, 1, 2), lookahead_batch_size=chunk, **call)
    assert output.images.shape == (3, 8, 8)
    assert ((output.images >= 0) & (output.images < CODES)).all()
    for i, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, negative_prompt="dots", generator=generators(i), **call)
        assert torch.equal(alone.images[0], output.images[i])
        assert alone.seeds == [i]


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.0])
def test_the_base_class_guides_what_predict_returns(make, guidance_scale):
    pipe = make()
    tokens = pipe("waves", guidance_scale=guidance_scale, generator=generators(4), output_type="latent").images

    def denoise(states: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
        cond, uncond = (pipe.transformer(states, torch.full((len(states),), word)) for word in (3, 0))
        return uncond + guidance_scale * (cond - uncond) if guidance_scale > 1 else cond

    scheduler = InfoGainScheduler.from_config(pipe.scheduler.config).with_timesteps(6)  # the family's default
    plain = decode(denoise, scheduler, torch.full((1, LENGTH), MASK), generator=generators(4), grid=(8, 8))
    assert torch.equal(tokens.flatten(1), plain.tokens)


def test_images_tell_how_to_make_them_again(make):
    pipe = make()
    image = pipe(["dots", "waves"], negative_prompt="stripes", generator=generators(0, 7)).images[1]
    settings = json.loads(image.info["infogain"])
    assert {name: settings[name] for name in ("prompt", "negative_prompt", "seed", "pipeline")} == {
        "prompt": "waves",
        "negative_prompt": "stripes",
        "seed": 7,
        "pipeline": "ToyPipeline",
    }
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (6, 3.0)
    assert pipe(settings["prompt"], negative_prompt="stripes", generator=generators(7)).images[0].tobytes() == image.tobytes()


def test_errors_name_the_argument(make):
    pipe = make()
    with pytest.raises(ValueError, match="`prompt` must be one of nothing, stripes, dots, waves, got 'cats'"):
        pipe("cats")
    with pytest.raises(ValueError, match="`height` and `width` must be 32, the only size of this model, got 36 and 32"):
        pipe("dots", height=36)


def test_what_a_family_must_define_is_named():
    class Empty(InfoGainImagePipeline):
        pass

    pipe = Empty()
    for name, arguments in (("canvas", ()), ("encode", (None,)), ("predict", (None,))):
        with pytest.raises(NotImplementedError, match=f"Empty must define `{name}`"):
            getattr(pipe, name)(*arguments)


def test_a_call_of_its_own_is_documented_with_the_arguments_that_it_shares():
    class Louder(InfoGainImagePipeline):
        def __call__(self, volume, height=None, num_runs=1):
            """Generates images.

            Args:
                volume: How loud,
                    in decibels.

            Raises:
                ValueError: If it hurts.
            """
            return self.run_call(locals())

    described = inspect.getdoc(Louder.__call__)
    assert described.startswith(
        "Generates images.\n\nArgs:\n    volume: How loud,\n        in decibels.\n    height, width: In pixels"
    )
    assert "    num_runs: Above 1, decodes" in described
    assert described.endswith("Raises:\n    ValueError: If it hurts.")
    assert "num_beams:" not in described
    assert "prompt:" not in described
