from __future__ import annotations

import builtins

import pytest
import torch
from PIL import Image

from diffusers_infogain.demo import checker, shapes
from diffusers_infogain.demo.shapes import Scenes, parse_caption


def draw(*objects: tuple[str, str, int, int]) -> torch.Tensor:
    """An image of (color, shape, x, y)."""
    values = {"color": [], "shape": [], "x": [], "y": []}
    for color, shape, x, y in objects:
        for name, value in zip(values, (list(shapes.COLORS).index(color), shapes.SHAPES.index(shape), x, y), strict=True):
            values[name].append(value)
    padded = {name: [*value, *[-1] * (shapes.MAX_OBJECTS - len(objects))] for name, value in values.items()}
    return shapes.render(Scenes(**{name: torch.tensor([value]) for name, value in padded.items()}))[0]


def rendered(num: int, seed: int, held_out: bool):
    captions = shapes.sample_captions(num, torch.Generator().manual_seed(seed), held_out=held_out)
    return captions, shapes.render(shapes.sample_scenes(captions, torch.Generator().manual_seed(seed + 1)))


@pytest.mark.parametrize("held_out", [False, True])
def test_agrees_with_clean_renders(held_out):
    captions, images = rendered(500, 11, held_out)
    verdicts = [checker.check_image(image, caption) for image, caption in zip(images, captions, strict=True)]
    assert sum(verdict.holds for verdict in verdicts) >= 0.99 * len(verdicts)


def test_refuses_other_captions():
    captions, images = rendered(400, 21, False)
    checked = 0
    for image, caption, other in zip(images, captions, captions[1:] + captions[:1], strict=True):
        colored = all(spec.color for spec in (*caption.objects, *other.objects))
        if other != caption and colored:  # so that no image can show both
            assert not checker.check_image(image, other).holds
            checked += 1
    assert checked > 50


def test_finds_shape_color_and_place():
    image = draw(("red", "circle", 16, 20), ("blue", "triangle", 44, 40))
    found = checker.find_objects(image)
    assert [(o.color, o.shape, o.x, o.y) for o in found] == [("red", "circle", 16, 20), ("blue", "triangle", 44, 40)]
    as_image = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
    assert checker.find_objects(as_image) == found


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red circle", "2 instead of 1 objects"),
        ("a red circle and a green triangle", "shows red circle, blue triangle"),
        ("a red square left of a blue triangle", "shows red circle, blue triangle"),
        ("a red circle right of a blue triangle", "not right of"),
        ("a red circle above a blue triangle", "not above"),
        ("a blue circle and a red triangle", "shows"),
        ("two circles", "shows"),
    ],
)
def test_says_what_is_wrong(caption, reason):
    image = draw(("red", "circle", 12, 20), ("blue", "triangle", 48, 28))
    verdict = checker.check_image(image, parse_caption(caption))
    assert not verdict.holds
    assert reason in verdict.reason


def test_relation_follows_the_larger_offset():
    image = draw(("red", "circle", 12, 12), ("blue", "square", 36, 52))
    assert checker.check_image(image, parse_caption("a red circle above a blue square")).holds
    assert checker.check_image(image, parse_caption("a blue square below a red circle")).holds
    assert not checker.check_image(image, parse_caption("a red circle left of a blue square")).holds


def test_counted_objects_have_one_color():
    image = draw(("red", "circle", 12, 12), ("blue", "circle", 48, 48))
    assert checker.check_image(image, parse_caption("two circles")).reason.startswith("not of one color")
    assert checker.check_image(draw(("red", "circle", 12, 12), ("red", "circle", 48, 48)), parse_caption("two circles")).holds


def test_a_broken_shape_is_no_shape():
    image = draw(("green", "square", 32, 32))
    half = draw(("green", "circle", 32, 32))
    cut = image.clone()
    cut[:, 32:] = torch.tensor(shapes.BACKGROUND).view(3, 1, 1) / 255
    assert checker.find_objects(cut)[0].shape is None
    two_colors = image.clone()
    two_colors[:, :, 32:40] = draw(("red", "square", 32, 32))[:, :, 32:40]
    assert checker.find_objects(two_colors)[0].color is None
    assert checker.find_objects(half)[0].shape == "circle"


def test_specks_are_no_objects_but_blobs_are():
    image = draw(("purple", "diamond", 20, 20))
    red = torch.tensor(shapes.COLORS["red"]).view(3, 1, 1) / 255
    speck, blob = image.clone(), image.clone()
    speck[:, 50:53, 50:53] = red
    blob[:, 50:56, 50:56] = red
    assert checker.check_image(speck, parse_caption("a purple diamond")).holds
    assert not checker.check_image(blob, parse_caption("a purple diamond")).holds


def test_an_empty_image_shows_nothing():
    empty = (torch.tensor(shapes.BACKGROUND) / 255).view(3, 1, 1).expand(3, 64, 64)
    assert checker.check_image(empty, parse_caption("a circle")).reason == "0 instead of 1 objects: nothing"


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"64 x 64.*\(32, 32, 3\)"):
        checker.find_objects(torch.zeros(3, 32, 32))


def test_missing_scipy_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(
        ModuleNotFoundError, match=r"The checker needs SciPy: in a clone of this package, pip install -e .\.\[demo\]"
    ):
        checker.find_objects(torch.zeros(3, 64, 64))
