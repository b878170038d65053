"""`generate --image`: files in, one sentence for what does not fit."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
from helpers.commands import run


@pytest.fixture
def folder(tmp_path):
    """An image of 8 x 8 pixels, four masks, and a file that is no image."""
    PIL.Image.effect_noise((8, 8), 90).convert("RGB").save(tmp_path / "photo.png")
    masks = {"nothing": (0, 0, 0, 0), "all": (0, 0, 8, 8), "half": (0, 4, 8, 8)}
    for name, box in masks.items():
        mask = PIL.Image.new("L", (8, 8), 0)
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
    PIL.Image.new("L", (8, 6), 255).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def generate(capsys, repository, folder, *flags):
    flags = [folder / flag if str(flag).endswith(".png") else flag for flag in flags]
    output = folder / "output"
    return run(capsys, "generate", "a", "--model", repository, "--output", output, "--steps", 3, "--device", "cpu", *flags)


def test_what_is_not_masked_stays(capsys, stock_repository, folder):
    code, out, err = generate(capsys, stock_repository, folder, "--image", "photo.png", "--mask", "half.png", "--num-images", 2)
    assert (code, err) == (0, "")
    assert "2 images in" in out
    original = np.array(PIL.Image.open(folder / "photo.png"))
    for seed in (0, 1):
        image = PIL.Image.open(folder / "output" / f"0000{seed}-a-seed{seed}.png")
        assert (np.array(image)[:4] == original[:4]).all()
        assert (np.array(image)[4:] != original[4:]).any()
        record = json.loads(image.text["infogain"])
        assert (record["image"], record["mask_image"], record["strength"]) == ("photo.png", "half.png", None)


def test_outpainting_adds_pixels_by_side(capsys, stock_repository, folder):
    code, _, err = generate(capsys, stock_repository, folder, "--image", "photo.png", "--outpaint", "left=4,bottom=2")
    assert (code, err) == (0, "")
    image = np.array(PIL.Image.open(folder / "output" / "00000-a-seed0.png"))
    assert image.shape == (10, 12, 3)
    assert (image[:8, 4:] == np.array(PIL.Image.open(folder / "photo.png"))).all()


def test_a_photograph_is_edited_as_its_camera_was_held(capsys, stock_repository, folder):
    turned = PIL.Image.open(folder / "photo.png").transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned.save(folder / "turned.png", exif=exif)
    code, _, _ = generate(capsys, stock_repository, folder, "--image", "turned.png", "--mask", "half.png")
    assert code == 0
    image = np.array(PIL.Image.open(folder / "output" / "00000-a-seed0.png"))
    assert (image[:4] == np.array(PIL.Image.open(folder / "photo.png"))[:4]).all()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--image", "photo.png", "--mask", "small.png"], "`mask_image` must have the size of `image`, 8 x 8 pixels, got 8 x 6."),
        (["--image", "photo.png", "--mask", "nothing.png"], "`mask_image` must mask something, but covers no token."),
        (["--image", "photo.png", "--mask", "all.png"], "`mask_image` must leave something of `image`, but covers all tokens."),
        (["--image", "photo.png", "--strength", 0], "`strength` must be above 0: at 0 nothing is decoded anew."),
        (
            ["--image", "photo.png", "--strength", 1],
            "`strength` must be below 1 without `mask_image`: at 1 nothing of `image` would be kept.",
        ),
        (["--image", "photo.png", "--strength", 1.5], "argument --strength: must be a number in [0, 1], got 1.5"),
        (["--image", "text.png"], "text.png is not an image, or is damaged."),
        (["--image", "missing.png"], "missing.png is missing."),
        (["--mask", "half.png"], "`mask_image` must be None without `image`, got a PIL image of mode 'L' and 8 x 8 pixels."),
        (
            ["--image", "photo.png", "--outpaint", "left=3"],
            "`outpaint['left']` must be a multiple of 2, the pixels of a token, got 3.",
        ),
        (
            ["--image", "photo.png", "--outpaint", "up=4"],
            "argument --outpaint: must be pixels by side (left, top, right, bottom), such as left=128,top=64, got 'up=4'",
        ),
        (["--image", "photo.png", "--outpaint", "left=2,left=4"], "such as left=128,top=64, got 'left=2,left=4'"),
        (["--image", "photo.png", "--outpaint", "left=²"], "such as left=128,top=64, got 'left=²'"),
        (
            ["--image", "photo.png", "--outpaint", "left=8", "--width", 8],
            "`outpaint` must leave room for the image in 8 x 8 pixels",
        ),
    ],
)
def test_what_does_not_fit_gets_one_sentence(capsys, stock_repository, folder, flags, sentence):
    try:
        code, _, err = generate(capsys, stock_repository, folder, *flags)
    except SystemExit as error:
        code, err = error.code, capsys.readouterr().err
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert not list((folder / "output").glob("*.png"))
