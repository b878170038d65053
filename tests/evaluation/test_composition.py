from __future__ import annotations

import pytest
import torch
from PIL import Image

from diffusers_infogain.demo import shapes
from diffusers_infogain.evaluation.composition import check_composition, composition_report
from diffusers_infogain.evaluation.prompts import Prompt, requests
from diffusers_infogain.evaluation.runs import FinishedImage
from diffusers_infogain.image_files import save_png


def finished(tmp_path, captions, images, num_images=1):
    every = requests([Prompt(caption.text) for caption in captions], num_images)
    result = []
    for request, image in zip(every, images, strict=True):
        path = tmp_path / request.file
        save_png(Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()), path, {})
        result.append(FinishedImage(request, path, {}))
    return result


def test_renderings_are_right_and_swapped_ones_are_not(tmp_path):
    generator = torch.Generator().manual_seed(0)
    captions = shapes.sample_captions(12, generator)
    pixels = shapes.render(shapes.sample_scenes(captions, generator))
    assert check_composition(finished(tmp_path, captions, pixels)) == [True] * 12
    other = check_composition(finished(tmp_path, captions, pixels.roll(1, 0)))
    assert sum(other) <= 1


def test_the_report_has_genevals_categories_and_held_out_combinations_apart(tmp_path):
    texts = ["a circle", "two squares", "a red circle", "a red circle"]
    captions = [shapes.parse_caption(text) for text in texts[:3]]
    held_out = next(caption for caption in shapes.all_captions() if caption.held_out and caption.category == "counting")
    captions.append(held_out)
    images = finished(tmp_path, captions, torch.ones(4, 3, 64, 64))
    report = composition_report(images, [True, False, True, True])
    assert list(report) == ["single object", "counting", "colors", "overall", "images", "trained", "held-out"]
    assert report["single object"].value == 1
    assert report["counting"].value == 0.5
    # The mean of the categories, as in GenEval, not of the images.
    assert report["overall"].value == pytest.approx((1 + 0.5 + 1) / 3)
    assert report["images"].value == 0.75
    assert (report["trained"].n, report["held-out"].n) == (3, 1)


def test_a_prompt_of_another_world_is_named(tmp_path):
    every = requests([Prompt("a fox in the snow")])
    with pytest.raises(ValueError, match="not a caption of the demo world: 'a fox in the snow'"):
        check_composition([FinishedImage(every[0], tmp_path / "x.png", {})])
