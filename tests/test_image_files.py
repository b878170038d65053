"""Damaged, huge and misleading images."""

from __future__ import annotations

import struct
import zlib

import PIL.Image
import PIL.PngImagePlugin
import pytest

from diffusers_infogain import image_files

METADATA = {"prompt": "a red circle", "seed": 3, "cost": [0.5]}


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "image.png"
    image_files.save_png(PIL.Image.effect_noise((24, 24), 50).convert("RGB"), path, METADATA)
    return path


def test_a_png_says_how_it_was_made_only_if_it_is_whole(png, tmp_path):
    assert image_files.read_png_metadata(png) == METADATA
    content = png.read_bytes()
    cut = tmp_path / "cut.png"
    for size in (0, 1, 8, 20, 100, len(content) // 2, len(content) - 13, len(content) - 12, len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.png is (damaged|not a PNG image)"):
            image_files.read_png_metadata(cut)
    cut.write_bytes(content[: len(content) // 2] + content[-12:])
    with pytest.raises(ValueError, match=r"cut\.png is damaged"):
        image_files.read_png_metadata(cut)


def png_saying(path, text):
    information = PIL.PngImagePlugin.PngInfo()
    information.add_text("infogain", text)
    PIL.Image.new("RGB", (2, 2)).save(path, "PNG", pnginfo=information)
    return path


@pytest.mark.parametrize("text", ["5", "[]", "null", "x", "[" * 100_000])
def test_other_settings_of_a_png_are_one_sentence(text, tmp_path):
    with pytest.raises(ValueError, match=r"^The text chunk 'infogain' of .*a\.png (is not JSON|must (hold|be nested))"):
        image_files.read_png_metadata(png_saying(tmp_path / "a.png", text))


def test_images_that_would_fill_the_memory_are_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def bomb(width, height, *chunks):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        path = tmp_path / "bomb.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b""))
        return path

    for size in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (13_000, 13_000)):
        with pytest.raises(ValueError, match=r"bomb\.png must have at most \d+ pixels"):
            image_files.open_image(bomb(*size))
    text = chunk(b"zTXt", b"infogain\0\0" + zlib.compress(b" " * 10**8))
    with pytest.raises(ValueError, match=r"bomb\.png is "):
        image_files.read_png_metadata(bomb(8, 8, text))
