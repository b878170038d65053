"""Image files: read without trusting them, and PNG files that carry the settings they were made with."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.PngImagePlugin

from .files import parse_json, read_bytes, replacing

METADATA_KEY = "infogain"
"""The text chunk of a PNG that holds its settings as JSON."""
MAX_PIXELS = 2**27
"""Most pixels of an image."""
IMAGE_LIMIT = 2**29
"""Size limit of image files, in bytes."""

_PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def open_image(path: str | os.PathLike[str], formats: tuple[str, ...] | None = None) -> PIL.Image.Image:
    """An image, decoded completely.

    Args:
        formats: Pillow's names of the formats that are accepted, such as ("PNG",); None for all.

    Raises:
        ValueError: If it is damaged, of another format or too large, or as `read_bytes`.
    """
    content = read_bytes(path, IMAGE_LIMIT)
    if content.startswith(_PNG_BEGIN) and _PNG_END not in content[-4096:]:
        raise ValueError(f"{path} is damaged: it is truncated.")
    try:
        with PIL.Image.open(io.BytesIO(content), formats=formats) as image:
            fits = math.prod(image.size) <= MAX_PIXELS
            if fits:
                image.load()
    except PIL.UnidentifiedImageError:
        kind = f"a {' or '.join(formats)} image" if formats else "an image"
        raise ValueError(f"{path} is not {kind}, or is damaged.") from None
    except PIL.Image.DecompressionBombError:
        fits = False
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    if not fits:
        raise ValueError(f"{path} must have at most {MAX_PIXELS} pixels, got more.")
    return image


def read_png_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that `save_png` wrote into a PNG. The whole image is decoded, so that a damaged one is found out.

    Raises:
        ValueError: If it cannot be decoded or holds no settings, or as `parse_json`.
    """
    text = open_image(path, ("PNG",)).info.get(METADATA_KEY)
    if not isinstance(text, str):
        raise ValueError(f"{path} does not say how it was made: it has no text chunk {METADATA_KEY!r}.")
    return parse_json(text, f"The text chunk {METADATA_KEY!r} of {path}")


def png_information(metadata: str) -> PIL.PngImagePlugin.PngInfo:
    """The text chunk "infogain" with `metadata`, which is JSON, as Pillow's `pnginfo`."""
    information = PIL.PngImagePlugin.PngInfo()
    information.add_text(METADATA_KEY, metadata)
    return information


def save_png(image: PIL.Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a PNG atomically, with `metadata` as JSON in its text chunk "infogain"."""
    with replacing(path) as file:
        image.save(file, "PNG", pnginfo=png_information(json.dumps(metadata, allow_nan=False)))
