"""What a visitor painted on an image, as the image and the mask that a pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image

from .work import enlarged

SHOWN_AT = 512
"""Pixels to which small images are enlarged before they are painted on."""


def canvas_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image to paint on: small ones are enlarged, so that a brush is finer than their pixels."""
    return enlarged(image.convert("RGB"), SHOWN_AT)


def own_size(image: PIL.Image.Image, mask: PIL.Image.Image | None, side: int) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """Image and mask without the enlargement of `canvas_image`, if that made the image from one of the model; else as they are.

    Args:
        image: What was painted on.
        mask: White where it was painted on. A pixel of the model is masked if any part of it is.
        side: The side of the model's images, in pixels.
    """
    factor = max(image.size) // side
    if factor < 2 or any(length % factor for length in image.size):
        return image, mask
    size = (image.width // factor, image.height // factor)
    small = image.resize(size, PIL.Image.Resampling.NEAREST)
    if not np.array_equal(np.array(small.resize(image.size, PIL.Image.Resampling.NEAREST)), np.array(image)):
        return image, mask
    if mask is None:
        return small, None
    blocks = np.array(mask).reshape(size[1], factor, size[0], factor)
    return small, PIL.Image.fromarray(blocks.max(axis=(1, 3)))


def painted(editor: Mapping[str, Any] | None) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """The image and its mask, "L", white where something was painted; None where nothing was.

    Args:
        editor: The value of the editor: "background" and "layers", PIL images with alpha.

    Raises:
        ValueError: If there is no image.
    """
    background = None if editor is None else editor["background"]
    if background is None:
        raise ValueError("`image` is missing: choose a picture, or take the one made last.")
    layers = [layer for layer in editor["layers"] if layer is not None]  # type: ignore[index]  # not None here
    covered = np.zeros((background.height, background.width), dtype=bool)
    for layer in layers:
        covered |= np.array(layer.convert("RGBA"))[..., 3] > 127  # the brush has a soft edge
    flat = PIL.Image.new("RGB", background.size, "white")
    rgba = background.convert("RGBA")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    mask = PIL.Image.fromarray(covered.astype(np.uint8) * 255) if covered.any() else None
    return flat, mask
