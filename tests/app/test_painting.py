"""What is painted on a picture becomes the picture and the mask of the model."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from diffusers_infogain.app.painting import canvas_image, own_size, painted


def picture(size: tuple[int, int] = (64, 64)) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def layer(size: tuple[int, int], box: tuple[int, int, int, int], alpha: int = 255) -> PIL.Image.Image:
    drawn = PIL.Image.new("RGBA", size, (0, 0, 0, 0))
    drawn.paste((225, 29, 72, alpha), box)
    return drawn


def test_painting_on_an_enlarged_picture_masks_its_own_pixels():
    image = picture()
    large = canvas_image(image)
    assert large.size == (512, 512)
    background, mask = painted({"background": large.convert("RGBA"), "layers": [layer(large.size, (83, 80, 97, 88))]})
    small, small_mask = own_size(background, mask, 64)
    assert small.tobytes() == image.tobytes()
    assert small_mask is not None
    expected = np.zeros((64, 64), dtype=np.uint8)
    expected[10, 10:13] = 255  # the pixels that were painted on, in part or as a whole
    assert np.array_equal(np.array(small_mask), expected)


def test_other_pictures_keep_their_size():
    for image in (picture((512, 512)), picture((100, 60)), picture((64, 64))):
        mask = PIL.Image.new("L", image.size)
        assert own_size(image, mask, 64) == (image, mask)
    assert own_size(canvas_image(picture()), None, 64)[1] is None


def test_all_layers_count_and_faint_edges_do_not():
    image = picture((80, 60))
    layers = [layer(image.size, (0, 0, 5, 5)), None, layer(image.size, (10, 10, 12, 12)), layer(image.size, (20, 20, 30, 30), 60)]
    background, mask = painted({"background": image, "layers": layers})
    assert background.size == image.size
    assert mask is not None
    assert np.count_nonzero(np.array(mask)) == 25 + 4


def test_nothing_painted_is_no_mask():
    image = picture()
    assert painted({"background": image, "layers": [layer(image.size, (0, 0, 0, 0))]})[1] is None
    assert painted({"background": image, "layers": []})[1] is None


def test_transparent_parts_of_a_picture_are_white():
    background, _ = painted({"background": layer((4, 4), (0, 0, 2, 4)), "layers": []})
    assert background.mode == "RGB"
    assert background.getpixel((3, 0)) == (255, 255, 255)
    assert background.getpixel((0, 0)) == (225, 29, 72)


@pytest.mark.parametrize("editor", [None, {"background": None, "layers": []}])
def test_a_missing_picture_is_said(editor):
    with pytest.raises(ValueError, match=r"^`image` is missing: choose a picture, or take the one made last\.$"):
        painted(editor)
