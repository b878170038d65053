"""Names in pictures: each beside what it names, none on another and none on the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""

_DISTANCES = (7, 12, 20, 32, 48, 68, 92, 120)
_ANGLES = (0, 45, -45, 90, -90, 135, -135, 180, 22, -22, 68, -68, 158, -158)
"""Where a name may stand from what it names: pixels and degrees, the best first."""
_MARGIN = 3


@dataclass(frozen=True)
class Label:
    """A name, its color, and the points of the data (x, y) that it may stand beside."""

    text: str
    color: Any
    points: Sequence[tuple[float, float]]


def place_boxes(sizes: Sequence[tuple[float, float]], anchors: Sequence[np.ndarray], taken: np.ndarray, frame: Box) -> list[Box]:
    """Places boxes in turn, each beside one of its points: inside the frame, off the boxes before it, off the data, and near.

    Args:
        sizes: Width and height of each box, in pixels.
        anchors: (P, 2) for each, the points that it may stand beside.
        taken: (Q, 2), points that boxes should not cover.
        frame: Where boxes should stand.
    """
    placed: list[Box] = []
    for (width, height), points in zip(sizes, anchors, strict=True):
        options = [_box(x, y, distance, angle, width, height) for x, y in points for distance in _DISTANCES for angle in _ANGLES]
        costs = [
            1000 * (not _inside(box, frame))
            + 1000 * sum(overlap(box, other) for other in placed)
            + 30 * _covered(box, taken)
            + distance
            for box, distance in zip(options, _distances(points), strict=True)
        ]
        placed.append(options[int(np.argmin(costs))])
    return placed


def _distances(points: np.ndarray) -> list[float]:
    """How far each option is, with a little more for each further angle."""
    return [distance + rank / 2 for _ in points for distance in _DISTANCES for rank in range(len(_ANGLES))]


def _box(x: float, y: float, distance: float, angle: float, width: float, height: float) -> Box:
    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    left = x + distance * dx - width * (1 - dx) / 2
    bottom = y + distance * dy - height * (1 - dy) / 2
    return left, bottom, left + width, bottom + height


def overlap(first: Box, second: Box, margin: float = _MARGIN) -> bool:
    """Whether two boxes are nearer than the margin."""
    apart = first[2] + margin <= second[0] or second[2] + margin <= first[0]
    return not (apart or first[3] + margin <= second[1] or second[3] + margin <= first[1])


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _covered(box: Box, points: np.ndarray) -> int:
    low, high = np.array(box[:2]) - _MARGIN, np.array(box[2:]) + _MARGIN
    return int(((points >= low) & (points <= high)).all(-1).sum())


def write_labels(axes: Any, labels: Sequence[Label]) -> None:
    """Writes names into a picture whose data are drawn, with a thin line to the point where that is not at hand."""
    figure = axes.figure
    figure.draw_without_rendering()  # settles the limits
    renderer = figure.canvas.get_renderer()
    in_axes = {"transform": axes.transAxes}
    drawn = _drawn(axes)
    texts = [axes.text(0, 0, label.text, color=label.color, fontsize=9, ha="left", va="bottom", **in_axes) for label in labels]
    extents = [text.get_window_extent(renderer) for text in texts]
    anchors = [axes.transData.transform(np.array(label.points, dtype=float).reshape(-1, 2)) for label in labels]
    bounds = axes.get_window_extent(renderer)
    boxes = place_boxes([(e.width, e.height) for e in extents], anchors, drawn, (*bounds.min, *bounds.max))
    to_axes = axes.transAxes.inverted()
    for text, box, points, label in zip(texts, boxes, anchors, labels, strict=True):
        text.set_position(to_axes.transform(box[:2]))
        nearest = np.clip(points, box[:2], box[2:])
        gaps = np.hypot(*(points - nearest).T)
        closest = int(gaps.argmin())
        if gaps[closest] > _DISTANCES[1]:
            ends = to_axes.transform([points[closest], nearest[closest]])
            axes.plot(*ends.T, color=label.color, linewidth=0.7, alpha=0.7, zorder=1.5, **in_axes)


def _drawn(axes: Any) -> np.ndarray:
    """Points all along the lines of a picture, in pixels, (Q, 2)."""
    found = [np.zeros((0, 2))]
    segments = [axes.transData.transform(line.get_xydata()) for line in axes.lines if len(line.get_xydata())]
    for bars in axes.collections:
        segments += [axes.transData.transform(ends) for ends in bars.get_segments()]
    for points in segments:
        points = points[np.isfinite(points).all(-1)]
        shares = np.linspace(0, 1, 12)[:, None, None]
        found += [points, (points[:-1] + shares * (points[1:] - points[:-1])).reshape(-1, 2)]
    return np.concatenate(found)
