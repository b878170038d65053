"""Reads an image of the demo world and tells whether a caption holds, as GenEval does for photos.

Rules only, no learning: colors by distance, objects as connected components, shapes by their overlap with the ideal ones.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..extras import missing
from .shapes import BACKGROUND, COLORS, HALF_WIDTH, IMAGE_SIZE, SHAPES, Caption, ObjectSpec, _signed_distance

# Share of an object's ink from which a pixel belongs to it (above one half, so that blurred tips that nearly touch do not join
# two objects), and at which it is far enough from the edge to show its color.
_INSIDE, _CORE = 0.65, 0.8
# Smaller components are specks, not objects; the smallest shape has 162 pixels.
_MIN_PIXELS = 10
# The overlap (intersection over union) with the ideal shape at which a component counts as that shape.
_MIN_OVERLAP = 0.85
# An object of which more than this share shows another color is not of one color.
_MAX_OTHER_COLOR = 0.15

_BACKGROUND = np.array(BACKGROUND) / 255
_PALETTE = np.array(list(COLORS.values())) / 255


@dataclass(frozen=True)
class FoundObject:
    """A connected component: its shape and color (None: none of the world's), its centre in pixels and its overlap.

    `overlap` is the intersection over union with the ideal shape that fits best.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    overlap: float

    def __str__(self) -> str:
        return f"{self.color or 'odd-colored'} {self.shape or 'blob'}"


@dataclass(frozen=True)
class Verdict:
    """Whether the caption holds, what the image shows, and what is wrong with it (empty if nothing)."""

    holds: bool
    objects: tuple[FoundObject, ...]
    reason: str = ""


def to_pixels(image: PIL.Image.Image | torch.Tensor) -> np.ndarray:
    """(64, 64, 3) in [0, 1] from a PIL image or a tensor (3, 64, 64).

    Raises:
        ValueError: For another size.
    """
    if isinstance(image, torch.Tensor):
        pixels = image.detach().float().cpu().permute(1, 2, 0).numpy()
    else:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(f"`image` must be a demo image of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got shape {pixels.shape}.")
    return pixels


@functools.cache
def _ideal(shape: str, x: float, y: float) -> np.ndarray:
    """The pixels of the ideal shape that has its centre at (x, y)."""
    grid = torch.arange(IMAGE_SIZE) + 0.5
    dx, dy = torch.broadcast_tensors(grid[None] - x, grid[:, None] - y)
    return (_signed_distance(shape, dx, dy, HALF_WIDTH[shape]) < 0.5 - _INSIDE).numpy()


def _overlap(inside: np.ndarray, shape: str) -> tuple[float, float, float]:
    """Intersection over union of a component with the ideal shape of the same centroid, and that shape's centre x, y.

    To half a pixel: the lattice of the world is coarser.
    """
    rows, columns = inside.nonzero()
    # A triangle's centroid lies a third of its height above its base.
    offset = HALF_WIDTH[shape] / 3 if shape == "triangle" else 0.0
    x, y = (round(2 * float(value)) / 2 for value in (columns.mean() + 0.5, rows.mean() + 0.5 - offset))
    ideal = _ideal(shape, x, y)
    return float((inside & ideal).sum() / (inside | ideal).sum()), x, y


def load_ndimage() -> Any:
    """scipy.ndimage, which finds the connected components.

    Raises:
        ModuleNotFoundError: Without SciPy.
    """
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        raise missing("The checker needs", "SciPy", "demo", "scipy") from error
    return ndimage


def find_objects(image: PIL.Image.Image | torch.Tensor) -> list[FoundObject]:
    """The objects that an image shows, from left to right."""
    ndimage = load_ndimage()

    away = to_pixels(image) - _BACKGROUND
    ink = _PALETTE - _BACKGROUND
    # The share of the nearest color's ink in a pixel: an edge pixel is a mixture of background and ink.
    share = (away @ ink.T / (ink**2).sum(-1)).max(-1)
    labels, count = ndimage.label(share > _INSIDE)
    found = []
    for label in range(1, count + 1):
        inside = labels == label
        if inside.sum() < _MIN_PIXELS:
            continue
        core = inside & (share > _CORE)
        nearest = ((away[core if core.any() else inside][:, None] - ink) ** 2).sum(-1).argmin(-1)
        votes = np.bincount(nearest, minlength=len(COLORS))
        one_color = votes.max() >= (1 - _MAX_OTHER_COLOR) * votes.sum()
        color = list(COLORS)[votes.argmax()] if one_color else None
        (overlap, x, y), best = max((_overlap(inside, shape), shape) for shape in SHAPES)
        found.append(FoundObject(best if overlap >= _MIN_OVERLAP else None, color, x, y, overlap))
    return sorted(found, key=lambda one: (one.x, one.y))


def _is_spec(found: FoundObject, spec: ObjectSpec) -> bool:
    return found.shape == spec.shape and found.color is not None and spec.color in (None, found.color)


def _in_relation(first: FoundObject, second: FoundObject, relation: str | None) -> bool:
    """Whether `first` lies so to `second`: the offset along the relation's axis is the larger one."""
    right, down = second.x - first.x, second.y - first.y
    along, across = {
        None: (1.0, 0.0),
        "left of": (right, down),
        "right of": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[relation]
    return along > abs(across)


def check_image(image: PIL.Image.Image | torch.Tensor, caption: Caption) -> Verdict:
    """Whether the image shows exactly what the caption says, and nothing else."""
    objects = find_objects(image)
    shown = ", ".join(map(str, objects)) or "nothing"
    specs = [spec for spec in caption.objects for _ in range(spec.count)]

    def verdict(reason: str = "") -> Verdict:
        return Verdict(not reason, tuple(objects), reason)

    if len(objects) != len(specs):
        return verdict(f"{len(objects)} instead of {len(specs)} objects: {shown}")
    matches = [order for order in itertools.permutations(objects) if all(map(_is_spec, order, specs))]
    if not matches:
        return verdict(f"shows {shown}")
    if caption.objects[0].count > 1 and len({found.color for found in objects}) > 1:
        return verdict(f"not of one color: {shown}")
    if len(specs) == 2 and not any(_in_relation(order[0], order[1], caption.relation) for order in matches):
        return verdict(f"not {caption.relation}: {shown}")
    return verdict()
