"""PNG files of a pipeline's images carry how they were made."""

from __future__ import annotations

import copy
import io
import json
import pickle

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import torch

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.image_files import read_png_metadata
from diffusers_infogain.pictures import Picture


def make(pipe: InfoGainPipeline, *seeds: int, **call):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(generator=generators, num_inference_steps=3, **call)


def test_a_saved_image_says_how_it_is_made_again(pipe, tmp_path):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler="margin", tokens_per_step=None)
    output = make(pipe, 5, 6, 7, 8, prompt=["a", "b"], num_images_per_prompt=2, negative_prompt="c", guidance_scale=2.0)
    for i, image in enumerate(output.images):
        image.save(tmp_path / f"{i}.png")
    settings = read_png_metadata(tmp_path / "2.png")
    assert settings["prompt"] == "b"
    assert settings["negative_prompt"] == "c"
    assert settings["seed"] == output.seeds[2]
    assert settings["pipeline"] == "InfoGainPipeline"
    assert settings["scheduler"]["sampler"] == "margin"
    assert (settings["height"], settings["width"]) == (8, 8)
    call = {name: settings[name] for name in ("prompt", "negative_prompt", "guidance_scale", "guidance_schedule")}
    again = make(pipe, settings["seed"], **call).images[0]
    assert again.tobytes() == output.images[2].tobytes()
    traces = again.settings.pop("trace"), settings.pop("trace")
    assert {name: value for name, value in again.settings.items() if name != "trace"} == settings
    # Equal states share a row of the network, so NFE depends on the batch.
    assert traces[0]["decoded_at"] == traces[1]["decoded_at"]


def test_the_default_guidance_is_told_as_the_number_that_it_was(components):
    pipe = InfoGainPipeline(**components, default_guidance_scale=3.0)
    pipe.set_progress_bar_config(disable=True)
    (image,) = make(pipe, 0, prompt="a").images
    assert json.loads(image.info["infogain"])["guidance_scale"] == 3.0


def test_other_outputs_and_files_are_as_they_were(pipe):
    assert isinstance(make(pipe, 0, prompt="a", output_type="np").images, np.ndarray)
    (image,) = make(pipe, 0, prompt="a").images
    assert isinstance(image, PIL.Image.Image)
    for kind in ("JPEG", "WEBP", "BMP"):
        image.save(io.BytesIO(), kind)
    assert type(image.resize((4, 4))) is PIL.Image.Image


def chunks(image: PIL.Image.Image, **params) -> dict[str, str]:
    file = io.BytesIO()
    image.save(file, "PNG", **params)
    return PIL.Image.open(file).text


def test_copies_keep_their_settings_and_the_caller_can_write_others():
    picture = Picture.of(PIL.Image.new("RGB", (2, 2)), {"seed": 3})
    for other in (picture, picture.copy(), copy.copy(picture), copy.deepcopy(picture), pickle.loads(pickle.dumps(picture))):
        assert chunks(other) == {"infogain": '{"seed": 3}'}
        assert other == picture
    own = PIL.PngImagePlugin.PngInfo()
    own.add_text("title", "mine")
    assert chunks(picture, pnginfo=own) == {"title": "mine"}
    assert chunks(picture, pnginfo=None) == {}
