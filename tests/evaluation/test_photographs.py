"""Images of every kind and size, as real data sets hold them."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_infogain.evaluation import photographs
from diffusers_infogain.evaluation.photographs import batches, decode, image_files

COLOR = (200, 100, 40)


def picture(width: int = 12, height: int = 8) -> Image.Image:
    """Plain, with a mark in the upper left corner that tells which way it lies."""
    image = Image.new("RGB", (width, height), COLOR)
    image.paste((0, 0, 0), (0, 0, 2, 2))
    return image


def array(image: Image.Image) -> np.ndarray:
    return np.array(image).astype(int)


def test_every_kind_of_photograph_becomes_rgb(tmp_path):
    rgb = picture()
    transparent = rgb.convert("RGBA")
    transparent.putpixel((5, 5), (1, 2, 3, 0))  # what lies under it is not to be seen
    kinds = {
        "gray": rgb.convert("L"),
        "palette": rgb.convert("P"),
        "bits": rgb.convert("1"),
        "alpha": transparent,
        "gray_alpha": transparent.convert("LA"),
        "16_bits": Image.fromarray(array(rgb.convert("L")).astype(np.uint16) * 257),
    }
    found = {}
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
        found[name] = decode(tmp_path / f"{name}.png")
        assert (found[name].mode, found[name].size) == ("RGB", (12, 8))
    gray = array(rgb.convert("L"))
    for name in ("gray", "16_bits"):
        assert (array(found[name]) == gray[:, :, None]).all()
    assert found["alpha"].getpixel((5, 5)) == found["gray_alpha"].getpixel((5, 5)) == (255, 255, 255)
    assert found["alpha"].getpixel((6, 6)) == COLOR
    assert np.abs(array(found["palette"]) - array(rgb)).max() < 60
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    assert np.abs(array(decode(tmp_path / "cmyk.jpg")) - array(rgb))[4:, 4:].max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, orientation):
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the camera was turned by 270 degrees
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = picture() if turned is None else picture().transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (array(decode(tmp_path / "a.png")) == array(picture())).all()


def test_the_first_frame_of_an_animation_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])  # as phones store depth
    for name in ("a.gif", "a.webp", "a.jpg"):
        assert np.abs(array(decode(tmp_path / name)) - [255, 0, 0]).max() < 3


def test_files_that_cannot_be_read_say_why(tmp_path):
    picture(90, 90).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((4, 4), 2**20, np.int32)).save(tmp_path / "wide.tiff")
    picture().save(tmp_path / "program.eps")  # Pillow would start Ghostscript for it
    (tmp_path / "program.eps").rename(tmp_path / "program.png")
    for name, reason in (
        ("half.jpg", "damaged"),
        ("text.png", "damaged"),
        ("empty.png", "damaged"),
        ("nowhere.png", "missing"),
        ("float.tiff", "floating-point pixels"),
        ("wide.tiff", "pixels of more than 16 bits"),
        ("program.png", "damaged"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name} ({reason})")):
            decode(tmp_path / name)


def test_images_are_found_in_subfolders_and_behind_links_in_the_order_of_their_names(tmp_path):
    real = tmp_path / "real"
    for name in ("n01/b.JPEG", "n01/a.png", "c.webp"):
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(real / name)
    (real / "notes.txt").write_text("no image")
    (real / ".hidden.png").write_text("no image")
    os.mkfifo(real / "pipe.png")
    (real / "n02").symlink_to(real / "n01")
    (real / "round").symlink_to(real)
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "elsewhere" / "d.bmp")
    (real / "n03").symlink_to(tmp_path / "elsewhere")
    names = [str(path.relative_to(real)) for path in image_files(real)]
    assert names == ["c.webp", "n01/a.png", "n01/b.JPEG", "n03/d.bmp"]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder of images"):
        image_files(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images \(.png, .jpg,"):
        image_files(tmp_path)
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 1 images in formats that are not read: .*b.heic"):
        image_files(tmp_path)


def stacked(sources, sizes=(4,), resize="bicubic", batch_size=3) -> list[dict[int, torch.Tensor]]:
    return list(batches(sources, len(sources), sizes, resize, batch_size, "images"))


@pytest.mark.parametrize(("resize", "method"), [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)])
def test_images_are_resized_by_pillow_from_the_centre(tmp_path, resize, method):
    images = [Image.effect_noise((width, height), 90).convert("RGB") for width, height in ((31, 20), (20, 30), (4, 4), (7, 7))]
    found = stacked(images, (4, 9), resize)
    assert [batch[9].shape for batch in found] == [(3, 3, 9, 9), (1, 3, 9, 9)]
    boxes = [(5.5, 0, 25.5, 20), (0, 5, 20, 25), (0, 0, 4, 4), (0, 0, 7, 7)]
    for size in (4, 9):
        rows = torch.cat([batch[size] for batch in found])
        for image, box, row in zip(images, boxes, rows, strict=True):
            expected = image.resize((size, size), method, box=box)
            assert (row.permute(1, 2, 0).numpy() == np.array(expected)).all()
    assert (found[0][4][2].permute(1, 2, 0).numpy() == np.array(images[2])).all()  # as it was, at its own size


def test_left_to_the_network_images_keep_their_sizes_and_batches_hold_one_size(monkeypatch):
    images = [Image.new("RGB", size, (i, 0, 0)) for i, size in enumerate([(5, 3)] * 4 + [(3, 5)] + [(5, 3)])]
    shapes = [tuple(batch[4].shape) for batch in stacked(images, resize="network")]
    assert shapes == [(3, 3, 3, 5), (1, 3, 3, 5), (1, 3, 5, 3), (1, 3, 3, 5)]
    assert torch.cat([batch[4][:, 0, 0, 0] for batch in stacked(images, resize="network")]).tolist() == list(range(6))
    monkeypatch.setattr(photographs, "_MOST_PIXELS", 30)
    assert [len(batch[4]) for batch in stacked(images, resize="network")] == [2, 2, 1, 1]


def test_all_that_cannot_be_read_is_named_once_everything_was_tried(tmp_path):
    paths = [tmp_path / f"{i:02d}.png" for i in range(16)]
    for i, path in enumerate(paths):
        if i < 4:
            picture().save(path)
        else:
            path.write_bytes(b"no png")
    found = []
    with pytest.raises(
        ValueError, match=r"12 of 16 images cannot be read: .*04.png \(damaged\), .*13.png \(damaged\) and 2 more\."
    ):
        found += batches(paths, len(paths), (4,), "bicubic", 2, "images")
    picture().save(paths[-1])
    with pytest.raises(ValueError, match="11 of 16 images cannot be read"):
        list(batches(paths, len(paths), (4,), "bicubic", 2, "images"))


def test_nothing_is_drawn_without_a_terminal(capsys):
    stacked([picture()])
    assert capsys.readouterr().err == ""


def test_no_more_is_decoded_than_is_asked_for(monkeypatch):
    monkeypatch.setattr(photographs, "_THREADS", 2)
    seen = []

    def sources():
        for i in range(50):
            seen.append(i)
            yield picture()

    every = batches(sources(), 50, (4,), "bicubic", 3, "images")
    next(every)
    assert len(seen) <= 3 + 2
    every.close()
