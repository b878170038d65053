"""Checks whether an image of the demo world shows its caption, as GenEval does for photographs.

By rules, without a learned model: objects are connected components, colors are the nearest ones of the palette, and shapes are
those of the largest overlap with ideal ones.
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

# A pixel with more than this share of an object's color is part of the object: more than half, so that blurred tips that nearly
# touch do not connect two objects.
_INSIDE = 0.65
# A pixel with more than this share is far enough from the edge to tell the object's color.
_CORE = 0.8
# Smaller components are specks, not objects; the smallest shape has 162 pixels.
_MIN_PIXELS = 10
# Smallest intersection over union with the ideal shape at which a component counts as that shape.
_MIN_OVERLAP = 0.85
# An object has no single color if a larger share of it than this shows another one.
_MAX_OTHER_COLOR = 0.15

_BACKGROUND = np.array(BACKGROUND) / 255
_PALETTE = np.array(list(COLORS.values())) / 255


@dataclass(frozen=True)
class FoundObject:
    """A connected component of an image.

    Attributes:
        shape, color: None if they are none of the world's.
        x, y: The centre, in pixels.
        overlap: Intersection over union with the ideal shape that fits best.
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
    """Whether the image shows its caption, the objects it shows, and what is wrong (empty if nothing is)."""

    holds: bool
    objects: tuple[FoundObject, ...]
    reason: str = ""


def to_pixels(image: PIL.Image.Image | torch.Tensor) -> np.ndarray:
    """Pixels (64, 64, 3) in [0, 1] of a PIL image or a tensor (3, 64, 64).

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
    """The pixels inside the ideal shape with its centre at (x, y), as a mask (64, 64)."""
    grid = torch.arange(IMAGE_SIZE) + 0.5
    dx, dy = torch.broadcast_tensors(grid[None] - x, grid[:, None] - y)
    return (_signed_distance(shape, dx, dy, HALF_WIDTH[shape]) < 0.5 - _INSIDE).numpy()


def _overlap(inside: np.ndarray, shape: str) -> tuple[float, float, float]:
    """Intersection over union of a component with the ideal shape of the same centroid, and that shape's centre x, y.

    The centre is rounded to half a pixel; objects of the world lie on a coarser lattice.
    """
    rows, columns = inside.nonzero()
    # A triangle's centroid lies a third of its height above its base.
    offset = HALF_WIDTH[shape] / 3 if shape == "triangle" else 0.0
    x, y = (round(2 * float(value)) / 2 for value in (columns.mean() + 0.5, rows.mean() + 0.5 - offset))
    ideal = _ideal(shape, x, y)
    return float((inside & ideal).sum() / (inside | ideal).sum()), x, y


def load_ndimage() -> Any:
    """`scipy.ndimage`, which finds connected components.

    Raises:
        ModuleNotFoundError: If SciPy is not installed.
    """
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        raise missing("The checker needs", "SciPy", "demo", "scipy") from error
    return ndimage


def find_objects(image: PIL.Image.Image | torch.Tensor) -> list[FoundObject]:
    """The objects of an image, from left to right.

    Raises:
        ModuleNotFoundError: If SciPy is not installed.
        ValueError: As `to_pixels`.
    """
    ndimage = load_ndimage()
    away = to_pixels(image) - _BACKGROUND
    ink = _PALETTE - _BACKGROUND
    # An edge pixel is a mixture of background and color; this is the share of the color.
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
    return sorted(found, key=lambda found: (found.x, found.y))


def _is_spec(found: FoundObject, spec: ObjectSpec) -> bool:
    return found.shape == spec.shape and found.color is not None and spec.color in (None, found.color)


def _in_relation(first: FoundObject, second: FoundObject, relation: str | None) -> bool:
    """Whether `first` is `relation` `second`: the offset along the relation's axis exceeds the one across it."""
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
    """Whether the image shows exactly the objects of the caption.

    Raises:
        ModuleNotFoundError: If SciPy is not installed.
        ValueError: As `to_pixels`.
    """
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
